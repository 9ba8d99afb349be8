// ---- The summary

function renderHead() {
  const model = run.model || {};
  const { rows: count, ok, error, flagged } = statistics;
  document.title = `${run.name} – report`;
  const figure = (name, value, more, kind) => el(kind ? `div.${kind}` : "div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : ""));
  const missing = run.num_rows - count;
  byId("head").append(
    el("h1", {}, run.name),
    el("p.under", {}, [model.id, run.dtype, run.status, formatMoment(run.updated_at), run.output].filter(Boolean).join("  ·  ")),
    el("dl.figures", {},
      figure("Rows", formatNumber(count), missing > 0 ? `${formatNumber(missing)} remaining` : ""),
      figure("Answered", formatNumber(ok), formatShare(ok, count)),
      figure("Errors", formatNumber(error), formatShare(error, count), error ? "bad" : ""),
      figure("Flagged", formatNumber(flagged), formatShare(flagged, count), flagged ? "warn" : ""),
      figure("Images", formatNumber(statistics.num_images), `${formatNumber(statistics.num_tiles)} tiles`),
      figure("Output tokens", formatNumber(statistics.num_output_tokens), count ? `${formatNumber(statistics.num_output_tokens / Math.max(1, ok), 1)} per row` : ""),
      run.seconds ? figure("Rows per second", formatNumber(count / run.seconds, 1), `in ${formatDuration(run.seconds)}`) : "",
    ),
  );
}

// ---- Distributions

/** Render bins; `go(start, stop)` is what a click on one does. */
function renderHistogram(counts, label, format, go = null) {
  if (!counts) return el("figure", {}, el("div.label", {}, label), el("p.note", {}, "no data"));
  const { bins, start, width } = counts;
  const most = Math.max(...bins);
  const rects = bins.map((count, i) => {
    const height = count ? Math.max(0.02, count / most) : 0;
    const title = svg("title", {});
    title.textContent = `${format(start + i * width)} to ${format(start + (i + 1) * width)}: ${formatNumber(count)}`;
    const rect = svg("rect", { x: i + 0.06, width: 0.88, y: 1 - height, height }, title);
    if (go) rect.addEventListener("click", () => go(start + i * width, start + (i + 1) * width));
    return rect;
  });
  const drawing = svg("svg", { class: go ? "pick" : "", viewBox: `0 0 ${bins.length} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...rects);
  const ends = [format(start), format(start + bins.length * width)].map((text) => el("span", {}, text));
  return el("figure", {}, el("div.label", {}, label), drawing, el("div.axis", {}, ends[0], el("span", {}, `mean ${format(counts.mean)}`), ends[1]));
}

function renderBar(name, count, most, total, pick, kind) {
  const parts = [
    el("span.name", { title: name.length > 24 ? name : null }, name === "" ? "(empty)" : name),
    el("span.track", {}, setShare(el("div.fill"), "width", most ? count / most : 0)),
    el("span.count", {}, formatNumber(count), el("small", {}, formatShare(count, total))),
  ];
  return pick ? el(kind ? `button.${kind}` : "button", { type: "button", "aria-pressed": "false", onclick: pick.go, "data-pick": pick.key }, parts) : el("div.row", {}, parts);
}

function renderDistribution(task) {
  const { top, rest, distinct, max_missed } = task.values;
  const total = task.kind === "list" ? task.answered : task.answered + task.unanswered;
  if (task.kind === "record") return renderFields(task);
  if (task.kind === "text" && !top.some(([, count]) => count > 1)) return el("p.note", {}, top.length ? `${formatNumber(distinct ?? top.length)} different answers, each given once.` : "No answers.");
  const of = task.kind === "choices" ? orderChoices(task) : task.kind === "bool" ? [["Yes", count(top, "Yes")], ["No", count(top, "No")]] : top;
  if (task.kind === "int" && !task.histogram && !rest && top.length > 1) return renderColumns(task, top);
  if (task.histogram) return renderNumbers(task);
  const limit = task.kind === "text" ? 6 : 12;
  const most = Math.max(1, ...of.map(([, times]) => times));
  const bars = of.slice(0, limit).map(([value, times]) => renderBar(value, times, most, total, pickValue(task, value)));
  const others = rest + of.slice(limit).reduce((sum, [, times]) => sum + times, 0);
  const notes = [];
  if (others) notes.push(`${formatNumber(others)} others${distinct === null ? "" : `, ${formatNumber(distinct - Math.min(limit, of.length))} different`}`);
  if (task.unanswered) notes.push(`${formatNumber(task.unanswered)} without a valid answer`);
  if (max_missed) notes.push(`counts are too low by at most ${formatNumber(max_missed)}`);
  return el("div", {}, task.kind === "list" ? el("div.label", {}, el("span", {}, "Most frequent"), el("span", {}, "share of answers")) : "", el(task.kind === "text" ? "div.bars.long" : "div.bars", {}, bars), notes.length ? el("p.note", {}, notes.join("; ")) : "");
}

/** Render numbers of many values: bins, which are filters, and the few values that are given more than once. */
function renderNumbers(task) {
  const { histogram, values } = task;
  const digits = task.kind === "int" ? 0 : Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(histogram.width))));
  const go = (from, stop) => applyFilters({ columns: { [task.name]: { ...EMPTY, from: String(from), to: String(task.kind === "int" ? stop - 1 : stop) } } }, true);
  const frequent = values.top.filter(([, times]) => times > 1).slice(0, 5);
  const bars = frequent.map(([value, times]) => renderBar(value, times, frequent[0][1], task.answered, pickValue(task, value)));
  const notes = [values.distinct === null ? "" : `${formatNumber(values.distinct)} different values`, task.unanswered ? `${formatNumber(task.unanswered)} without a valid answer` : "", values.max_missed ? `counts of values are too low by at most ${formatNumber(values.max_missed)}` : ""];
  return el("div", {}, renderHistogram(histogram, "Values", (value) => formatNumber(value, digits), go), bars.length ? [el("div.label", {}, "Most frequent"), el("div.bars", {}, bars)] : "", el("p.note", {}, notes.filter(Boolean).join("; ")));
}

const count = (top, key) => (top.find(([value]) => value === key) || [key, 0])[1];
const orderChoices = (task) => task.choices.map((choice) => [choice, count(task.values.top, choice)]).sort((a, b) => (task.choices.length > 12 ? b[1] - a[1] : 0));

function renderColumns(task, top) {
  const sorted = [...top].sort((a, b) => Number(a[0]) - Number(b[0]));
  const most = Math.max(...sorted.map(([, times]) => times));
  return el("div.columns", {}, sorted.map(([value, times]) => {
    const pick = pickValue(task, value);
    return el("button", { type: "button", title: `${value}: ${formatNumber(times)}`, "aria-pressed": "false", onclick: pick.go, "data-pick": pick.key }, formatNumber(times), setShare(el("i"), "height", (0.62 * times) / most), el("b", {}, value));
  }));
}

function renderFields(task) {
  const parts = task.fields.map((field) => {
    const values = field.values ? field.values.top.map(([value, times]) => `${value} (${formatNumber(times)})`).join(", ") : "";
    const element = renderBar(field.path, field.present, field.possible, field.possible);
    element.querySelector(".name").classList.add("mono");
    element.title = values;
    return values ? [element, el("span.note.values.text", {}, values)] : [element];
  });
  return el("div", {}, el("div.label", {}, el("span", {}, "Fields"), el("span", {}, "present")), el("div.bars", {}, parts));
}

function renderCalibration(truth) {
  const used = truth.bins.map((bin, i) => ({ ...bin, from: i / truth.bins.length, to: (i + 1) / truth.bins.length })).filter((bin) => bin.count);
  const most = Math.max(...used.map((bin) => bin.count));
  const rects = used.map((bin) => {
    const title = svg("title", {});
    title.textContent = `confidence ${formatRounded(bin.from)} to ${formatRounded(bin.to)}: ${formatShare(bin.right * bin.count, bin.count)} of ${formatNumber(bin.count)} correct`;
    return svg("rect", { x: bin.from * 100 + 0.8, width: 8.4, y: 100 - bin.right * 100, height: Math.max(0.5, bin.right * 100), opacity: 0.45 + (0.55 * bin.count) / most }, title);
  });
  const drawing = svg("svg", { viewBox: "0 0 100 100", role: "img", "aria-label": "Accuracy by confidence" }, ...rects, svg("line", { x1: 0, y1: 100, x2: 100, y2: 0 }));
  const line = (bin) => el("tr", {}, el("td", {}, `${bin.from.toFixed(1)}–${bin.to.toFixed(1)}`), el("td.n", {}, formatNumber(bin.count)), el("td.n", {}, formatRounded(bin.confidence)), el("td.n", {}, formatRounded(bin.right)));
  return el("div.calibration", {},
    el("figure.square", {}, drawing, el("div.axis", {}, el("span", {}, "0"), el("span", {}, "confidence"), el("span", {}, "1"))),
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "Bin"), el("th.n", {}, "Answers"), el("th.n", {}, "Confidence"), el("th.n", {}, "Accuracy"))), el("tbody", {}, used.map(line))),
  );
}

function renderTruth(task) {
  const truth = task.truth;
  if (!truth) return "";
  const mistakes = truth.mistakes.top.slice(0, 5).map(([[expected, given], times]) => el("tr", {}, el("td.text", {}, expected), el("td.text", {}, given), el("td.n", {}, formatNumber(times))));
  return el("div.body", {},
    el("div", {},
      el("div.label", {}, el("span", {}, `${formatShare(truth.right, truth.count)} correct: ${formatNumber(truth.right)} of ${formatNumber(truth.count)}${truth.unanswered ? `, ${formatNumber(truth.unanswered)} without an answer` : ""}`), el("span", {}, `calibration error ${truth.expected_error.toFixed(3)}`)),
      truth.count ? renderCalibration(truth) : ""),
    mistakes.length ? el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "Truth"), el("th", {}, "Answer"), el("th.n", {}, "Times"))), el("tbody", {}, mistakes)) : "");
}

function renderSizes(task) {
  if (task.kind === "list") return renderHistogram(task.list_lengths, "Items", (value) => formatNumber(value));
  return ["text", "record"].includes(task.kind) ? renderHistogram(task.length, "Characters", (value) => formatNumber(value)) : "";
}

function renderPanel(task) {
  const flags = statistics.flags.top.filter(([flag]) => flag.startsWith(`${task.name}:`));
  const confidence = task.choices.length ? renderHistogram(task.confidence, "Confidence", formatRounded) : renderHistogram(task.confidence, "Log-probability per token", (value) => (Math.abs(value) < 1e-9 ? "0" : value.toFixed(task.confidence.start < -0.5 ? 2 : 3).replace("-", "−")));
  const about = task.about || {};
  return el(tasks.length === 1 ? "article.panel.wide" : "article.panel", {},
    el("div.title", {}, el("h3", {}, task.name), task.kind === task.name ? "" : el("span.pill", {}, task.kind), el("span.end", {}, `${formatNumber(task.answered)} answers`)),
    about.prompt ? el("p.prompt.text", { title: about.prompt }, about.prompt) : "",
    el("div.body", {}, renderDistribution(task), el("div.body", {},
      el("div.pair", {}, confidence, renderSizes(task)),
      flags.length ? el("div.chips", {}, flags.map(([flag, times]) => el("button.pill.warn", { type: "button", onclick: () => applyFilters({ flag }, true) }, `${flag.slice(task.name.length + 1)} ${formatNumber(times)}`))) : "",
    )),
    renderTruth(task));
}

function renderScores() {
  const parts = Object.entries(statistics.categories).map(([column, values]) => el("div", {},
    el("div.label", {}, el("span", {}, column), el("span", {}, "points, share of rows")),
    el("div.bars", {}, values.map(({ value, score, count }) => renderBar(value, score, count, count)))));
  return run.score ? el("div.panel.wide", {}, el("p", {}, run.score), el("div.body", {}, parts)) : "";
}

function renderReasons(lines, rest) {
  const [shown, folded] = [lines.slice(0, SHOWN_REASONS), lines.slice(SHOWN_REASONS)];
  const note = rest ? el("p.note", {}, `${formatNumber(rest)} rows with other reasons`) : "";
  return el("div.panel", {}, el("div.bars.long", {}, shown), folded.length ? el("details.more", {}, el("summary", {}, `${formatNumber(folded.length)} more reasons`), el("div.bars.long", {}, folded)) : "", note);
}

function renderSummary() {
  if (run.score) byId("tasks").append(el("h2", {}, "Scores"), renderScores());
  byId("tasks").append(el("h2", {}, run.has_tasks ? "Tasks" : "Answers"), el(tasks.length === 1 ? "div.panels.one" : "div.panels", {}, tasks.map(renderPanel)));
  const { top, rest, total } = { total: statistics.error, ...statistics.reasons };
  if (!top.length) return;
  const most = top[0].count;
  const lines = top.map((reason) => renderBar(`${reason.stage}: ${reason.reason}`, reason.count, most, statistics.error, { key: `reason\u0000${reason.key}`, go: () => applyFilters({ reason: state.reason === reason.key ? "" : reason.key }, true) }, "bad"));
  byId("errors").append(el("h2", {}, "Errors", el("small", {}, `${formatNumber(total)} rows by stage and reason`)), renderReasons(lines, rest));
}

// ---- About this run

/** Render what people decided: accuracy with the interval that holds the true one in 19 of 20 cases, and calibration. */
function renderReview() {
  if (!data.review.length) return;
  const percent = (share) => `${(100 * share).toFixed(1)}\u2009%`;
  const panel = ({ task, accuracy, right, reviewed, low, high, calibration }) => el("article.panel", {},
    el("div.title", {}, el("h3", {}, task), el("span.end", {}, `${formatNumber(right)} of ${formatNumber(reviewed)} right`)),
    el("p", {}, el("strong", {}, percent(accuracy)), ` right, 95\u2009% interval ${percent(low)} to ${percent(high)}`),
    calibration ? el("div", {}, el("div.label", {}, el("span", {}, "Accuracy by confidence"), el("span", {}, `calibration error ${calibration.expected_error.toFixed(3)}`)), renderCalibration(calibration)) : "");
  byId("tasks").before(el("section", { id: "review" }, el("h2", {}, "Reviewed by people", el("small", {}, "of the reviewed answers; it holds for all answers if they were picked at random")), el("div.panels", {}, data.review.map(panel))));
}

function renderAbout() {
  const list = (pairs) => el("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && toText(value) !== "").flatMap(([name, value]) => [el("dt", {}, name), el("dd.text", {}, toText(value))]));
  const setup = tasks.filter(() => run.has_tasks).map((task) => [task.name, JSON.stringify(task.about)]);
  const panel = (title, content) => el("div.panel", {}, el("h3", {}, title), content);
  const percent = (share) => formatShare(share, 1);
  const sessions = (run.sessions || []).map((session) => panel(`session until ${formatMoment(session.ended_at)}`, list([
    ...Object.entries(session.seconds).map(([phase, seconds]) => [phase, formatDuration(seconds)]),
    ["limited by", session.limited_by],
    ...["preprocessors", "replicas"].flatMap((stage) => [
      [stage, `${session[stage].actors}, idle ${percent(session[stage].idle)}, ${formatNumber(session[stage].rows_per_s, 1)} rows/s, at most ${formatNumber(session[stage].peak_bytes / 1e6)} MB`],
    ]),
    ["engine's slots in use", session.replicas.occupancy === null ? "" : percent(session.replicas.occupancy)],
    ["driver", `idle ${percent(1 - session.driver_busy)}, at most ${formatNumber(session.driver_peak_bytes / 1e6)} MB`],
    ["object store", `at most ${percent(session.object_store)}`],
  ])));
  byId("about").append(el("details", {}, el("summary", {}, "About this run"), el("div.panels", {},
    panel("run", list([["output", run.output], ["status", run.status], ["started", formatMoment(run.started_at)], ["updated", formatMoment(run.updated_at)], ...Object.entries(run.model || {}).map(([name, value]) => [`model ${name}`, value]), ["dtype", run.dtype]])),
    panel("options", list(Object.entries(run.config).map(([name, value]) => [name.replaceAll("_", "-"), value]))),
    setup.length ? panel("tasks", list(setup)) : "",
    panel("versions", list(Object.entries(run.versions || {}))),
    ...sessions)));
}

