// ---- One row, which has a link: the page's address with its id after #

const repair = (id) => id.toWellFormed?.() ?? id; // a name that is no valid text has no address
const linkTo = (row) => `#${encodeURIComponent(repair(row.id)).replaceAll("%2F", "/")}`;

function renderAnswer(task, row, i) {
  const answer = row.answers[i];
  const scores = answer.scores && typeof answer.scores === "object" ? Object.entries(answer.scores).sort((a, b) => b[1] - a[1]) : null;
  const value = task.kind === "list" && answer.value ? el("div.chips", {}, answer.value.map((item) => el("span.pill.text", {}, toText(item)))) : task.kind === "record" && answer.value ? el("pre.text", {}, JSON.stringify(answer.value, null, 1)) : el("div.value.text", {}, answer.value === null ? "no valid answer" : toText(answer.value) || "(empty)");
  const differs = answer.text && answer.text !== toText(answer.value) && !(task.kind === "record" && answer.value);
  return el(answer.wrong ? "div.answer.wrong" : "div.answer", {},
    el("div.title", {}, el("h3", {}, task.name), answer.truth === null ? "" : answer.wrong ? el("span.pill.bad", {}, `truth: ${answer.truth}`) : el("span.pill.good", {}, "correct"),
      row.flags.filter((flag) => flag.startsWith(`${task.name}:`)).map((flag) => el("span.pill.warn", {}, flag.slice(task.name.length + 1))),
      el("span.end", {}, answer.confidence === null ? "" : [scores ? formatRounded(answer.confidence) : `${formatRounded(answer.confidence)} per token (log ${formatRounded(answer.scores)})`, " ", renderMeter(answer.confidence)])),
    el("p.prompt.text", {}, getQuestion(row, i)),
    value,
    scores && scores.length > 1 ? el("div.bars", {}, scores.slice(0, 12).map(([name, probability]) => el("div.row", {}, el("span.name", {}, name), el("span.track", {}, setShare(el("div.fill"), "width", probability || 0)), el("span.count", {}, (probability || 0).toFixed(3))))) : "",
    differs ? el("pre.text", {}, answer.text) : "",
    answer.alternative ? el("div", {}, el("div.label", {}, el("span", {}, `Alternative answer, not chosen${answer.alternative.finish_reason ? ` (${answer.alternative.finish_reason})` : ""}`)), el("pre.text", {}, toText(answer.alternative.text))) : "");
}

function renderFacts(row) {
  const [images, tiles, prompt, output] = row.counts;
  const pairs = [["id", row.id], ["uri", row.uri], ["row", formatNumber(row.row)], ["size", `${formatNumber(images)} image${images === 1 ? "" : "s"}, ${formatNumber(tiles)} tiles, ${formatNumber(prompt)} prompt and ${formatNumber(output)} output tokens`], ["finish reason", row.status === "ok" ? row.answers.map((answer) => answer.finish).join(", ") : ""], ["frames at", row.timestamps_s.map(formatClock).join(", ")], ["groups", row.groups.map((group) => GROUPS[group].toLowerCase()).join(", ")], ...kept.map((name, i) => [name, toText(row.kept[i])])];
  return el("dl", {}, pairs.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd.text", {}, value)]));
}

function renderSimilar(row) {
  const others = rows.filter((other) => other !== row && row.similar !== null && other.similar === row.similar);
  const links = others.slice(0, MANY_VALUES).map((other) => el("li", {}, el("a.text", { href: linkTo(other) }, other.id)));
  return others.length ? el("div", {}, el("div.label", {}, `Similar pictures: ${formatNumber(others.length)}`), el("ul.links", {}, links)) : "";
}

function renderRowBar(row, at) {
  const move = (by, name, sign) => el("button", { type: "button", title: name, disabled: !shown[at + by], onclick: () => openRow(at + by) }, sign);
  const copy = el("button.copy", { type: "button", onclick: () => navigator.clipboard.writeText(location.href).then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Not allowed"; }) }, "Copy link");
  return el("div.bar", {},
    el("a.name", { href: linkTo(row), title: row.id }, row.id), el("span.soft", {}, `${at + 1} of ${formatNumber(shown.length)}`),
    navigator.clipboard ? copy : "",
    move(-1, "Previous (left arrow or k)", "←"), move(1, "Next (right arrow or j)", "→"), el("button", { type: "button", id: "close", title: "Close (Escape)", onclick: () => byId("details").close() }, "×"));
}

function renderMedia({ images, missing, more }) {
  const figures = (images || []).map((image) => el("figure", {}, renderImage(image, false), image.time_s === undefined ? "" : el("figcaption", {}, formatClock(image.time_s))));
  return el(figures.length === 1 ? "div.media.single" : "div.media", {}, missing ? el("span.missing.text", {}, missing) : figures, more ? el("span.missing", {}, `and ${formatNumber(more)} more`) : "");
}

function openRow(at) {
  opened = at;
  const row = shown[at];
  byId("details").replaceChildren(renderRowBar(row, at), el("div.open", {},
    renderMedia(row.media),
    el("div.facts", {}, row.status === "error" ? el("p.error.text", {}, `${row.stage}: ${row.error}`) : tasks.map((task, i) => renderAnswer(task, row, i)), renderSimilar(row), renderFacts(row))));
  if (!byId("details").open) byId("details").showModal();
  byId("close").focus();
  history.replaceState(null, "", linkTo(row));
}

/** Open the row that the address names, if the page has it. */
function openLinked() {
  const named = location.hash.slice(1);
  byId("notice").textContent = "";
  if (!named) return byId("details").close();
  const row = rows.find(({ id }) => id === named || repair(id) === decode(named));
  if (!row) { byId("notice").textContent = `${decode(named)} is not on this page${rows.length < statistics.rows ? ", which shows a sample of the rows" : ""}.`; return; }
  if (!shown.includes(row)) applyFilters({ ...NO_FILTERS });
  openRow(shown.indexOf(row));
}

function decode(text) {
  try { return decodeURIComponent(text); } catch { return text; } // a lone % is no code
}
