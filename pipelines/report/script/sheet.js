// ---- The contact sheet

const haystack = rows.map((row) => [row.id, row.uri, row.error, ...row.questions, ...row.flags, ...row.answers.flatMap((answer) => [toText(answer.value), answer.text, answer.truth]), ...row.kept.map(toText)].filter(Boolean).join("\n").toLowerCase());
const findTask = (name) => tasks.findIndex((task) => task.name === name);
const minConfidence = (row) => Math.min(2, ...row.answers.filter((_, i) => state.task === "" || i === findTask(state.task)).map((answer) => answer.confidence ?? 2));
const isTextOnly = (row) => row.status === "ok" && row.counts[0] === 0;
const getQuestion = (row, i) => row.questions[i] ?? tasks[i].about.prompt ?? "";
const isAskedInFull = tasks.map((_, i) => new Set(rows.map((row) => row.questions[i] ?? null)).size > 1); // on cards: where it differs by row

function renderMarks(row) {
  const wrong = row.answers.filter((answer) => answer.wrong).length;
  const flags = [...new Set(row.flags.map((flag) => (run.has_tasks ? flag : flag.split(":")[1])))];
  return el("div.marks", {}, row.status === "error" ? el("span.pill.bad", {}, row.stage || "error") : "", state.group === "similar" ? el("span.pill", { title: "rows with this number have similar pictures" }, `≈ ${row.similar + 1}`) : "", wrong ? el("span.pill.bad", {}, "wrong") : "", flags.slice(0, 3).map((flag) => el("span.pill.warn", {}, flag)), flags.length > 3 ? el("span.pill.warn", {}, `+${flags.length - 3}`) : "");
}

function renderMeter(confidence) {
  if (confidence === null) return el("span");
  const kind = confidence < 0.5 ? "span.meter.low" : confidence < 0.8 ? "span.meter.mid" : "span.meter";
  return el(kind, { title: `confidence ${formatRounded(confidence)}` }, setShare(el("i"), "width", confidence));
}

function renderImage(image, lazy = true) {
  return el("img", { alt: "", loading: lazy ? "lazy" : null, width: image.width, height: image.height, src: image.src });
}

function renderFrame(row) {
  const { images, missing, more } = row.media;
  if (isTextOnly(row)) return el("div.frame", {}, el("p.asked.text", {}, listQuestions(row).map((question) => el("span", {}, question))), renderMarks(row));
  if (missing || !images.length) return el("div.frame", {}, el("span.missing.text", {}, row.status === "error" ? "not readable" : missing || "no image"), renderMarks(row));
  if (images.length === 1 && images[0].time_s === undefined) return el("div.frame", {}, renderImage(images[0]), renderMarks(row));
  const strip = el("div.film-strip", {}, images.map((image, i) => el("div", {}, renderImage(image), image.time_s === undefined ? (more && i === images.length - 1 ? el("span", {}, `+${more}`) : "") : el("span", {}, formatClock(image.time_s)))));
  strip.style.setProperty("grid-template-columns", `repeat(${Math.min(images.length, images.length > 6 ? Math.ceil(images.length / 2) : 6)}, 1fr)`);
  return el("div.frame", {}, strip, renderMarks(row));
}

/** Return the questions that a text-only row shows instead of a picture: those of its task, or all that are its own. */
function listQuestions(row) {
  const own = tasks.map((_, i) => i).filter((i) => (state.task === "" ? row.questions[i] : i === findTask(state.task)));
  return (own.length ? own : [0]).map((i) => getQuestion(row, i));
}

function renderQuestion(row, i) {
  return isAskedInFull[i] && !isTextOnly(row) && getQuestion(row, i) ? el("span.free.soft.question.text", { title: getQuestion(row, i) }, getQuestion(row, i)) : "";
}

function renderCardAnswers(row) {
  if (row.status === "error") return el("div.answers", {}, el("span.free.soft", { title: row.error }, row.error));
  const only = state.task === "" ? -1 : findTask(state.task);
  if (tasks.length === 1 || only >= 0) {
    const at = Math.max(0, only);
    const answer = row.answers[at];
    return el(answer.wrong ? "div.answers.wrong" : "div.answers", {}, renderQuestion(row, at), el("span.free.text.value", {}, toText(answer.value) || answer.text || "(empty)"), answer.wrong ? el("span.free.soft", {}, `truth: ${answer.truth}`) : "");
  }
  return el("div.answers", {}, tasks.map((task, i) => {
    const answer = row.answers[i];
    return [renderQuestion(row, i), el(answer.wrong ? "div.one.wrong" : "div.one", {}, el("span.key", { title: task.name }, task.name), el("span.value", { title: toText(answer.value) || answer.text }, answer.value === null ? "–" : toText(answer.value) || "(empty)"), renderMeter(answer.confidence))];
  }));
}

function renderCard(row, at) {
  const film = row.media.images && row.media.images.length > 1;
  const name = row.id.split("/").pop() || row.id;
  const confidence = tasks.length === 1 || state.task ? minConfidence(row) : 2;
  return el(film ? "div.card.film" : "div.card", { tabindex: at ? "-1" : "0", role: "button", "data-at": at, "aria-label": `Row ${row.row}: ${name}` },
    renderFrame(row), renderCardAnswers(row), el("div.foot", {}, el("span.name", { title: row.id }, el("bdi", {}, name)), confidence <= 1 ? [formatRounded(confidence), renderMeter(confidence)] : ""));
}

/** What rows are sorted by, lowest first; a row without a confidence or without similar pictures comes last. */
const ORDERS = {
  unsure: minConfidence,
  sure: (row) => (minConfidence(row) > 1 ? 2 : -minConfidence(row)),
  similar: (row) => row.similar ?? rows.length,
};

function renderCards() {
  shown = rows.filter(matchesFilters);
  if (state.order !== "row") shown = shown.map((row) => [ORDERS[state.order](row), row]).sort((a, b) => a[0] - b[0]).map(([, row]) => row);
  byId("count").textContent = `${formatNumber(shown.length)} shown`;
  const none = el("p.none", {}, rows.length ? "No row on this page matches. The page shows a sample; the counts above cover all rows." : "This page shows no rows.");
  byId("cards").replaceChildren(...(shown.length ? shown.slice(0, AT_ONCE).map(renderCard) : [none]));
  byId("more").hidden = shown.length <= AT_ONCE;
}

function appendCards() {
  const { children } = byId("cards");
  if (children.length >= shown.length) return;
  byId("cards").append(...shown.slice(children.length, children.length + AT_ONCE).map((row, i) => renderCard(row, children.length + i)));
  byId("more").hidden = children.length >= shown.length;
}

