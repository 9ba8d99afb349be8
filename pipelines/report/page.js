
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { run, statistics, rows, kept } = data;
  const tasks = statistics.tasks;
  const GROUPS = { random: "Random", unsure: "Least confident", flagged: "Flagged", wrong: "Wrong", errors: "Errors" };
  const state = { group: "", task: "", flag: "", value: null, reason: "", text: "", order: "row" };
  let shown = []; // the rows that match the filters, in order
  let opened = -1; // index in `shown` of the open row
  const SHOWN_REASONS = 15; // of errors; the others are folded
  const AT_ONCE = 300; // cards; the next ones are added when the last of them come into view

  // ---- Elements. All untrusted text enters the page here, as text nodes.

  function el(name, attributes = {}, ...children) {
    const [tag, ...classes] = name.split(".");
    const element = document.createElement(tag);
    if (classes.length) element.className = classes.join(" ");
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  }

  function svg(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function setShare(element, property, share) {
    element.style.setProperty(property, `${(100 * share).toFixed(2)}%`);
    return element;
  }

  const byId = (id) => document.getElementById(id);
  const formatNumber = (value, digits = 0) => Number(value).toLocaleString("en-US", { maximumFractionDigits: digits });
  const formatShare = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part && part * 1000 < whole ? 3 : 1)}\u2009%` : "–");
  const formatMoment = (text) => (text ? text.replace("T", " ").replace(/:\d\d(\+00:00)$/, " UTC").replace(/\+00:00$/, " UTC") : "");
  const formatRounded = (value) => (value === null ? "–" : value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 }));

  function formatClock(seconds) {
    const [minutes, rest] = [Math.floor(seconds / 60), seconds % 60];
    return minutes ? `${minutes}:${rest.toFixed(1).padStart(4, "0")}` : `${rest.toFixed(1)}s`;
  }

  function formatDuration(seconds) {
    if (seconds < 120) return `${formatNumber(seconds)} s`;
    const minutes = Math.round(seconds / 60);
    return minutes < 120 ? `${minutes} min` : `${formatNumber(minutes / 60, 1)} h`;
  }

  // ---- Values of answers

  function toText(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "boolean") return value ? "Yes" : "No";
    if (Array.isArray(value)) return value.map(toText).join(", ");
    if (typeof value === "object") return Object.entries(value).map(([key, item]) => `${key}: ${toText(item)}`).join(" · ");
    return String(value);
  }

  const hasValue = (answer, key) => {
    const value = answer.value;
    if (value === null) return false;
    const same = (item) => { const text = toText(item); return text === key || (key.length >= 200 && text.startsWith(key)); };
    return Array.isArray(value) ? value.some(same) : same(value);
  };

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

  function renderHistogram(counts, label, format) {
    if (!counts) return el("figure", {}, el("div.label", {}, label), el("p.note", {}, "no data"));
    const { bins, start, width } = counts;
    const most = Math.max(...bins);
    const rects = bins.map((count, i) => {
      const height = count ? Math.max(0.02, count / most) : 0;
      const title = svg("title", {});
      title.textContent = `${format(start + i * width)} to ${format(start + (i + 1) * width)}: ${formatNumber(count)}`;
      return svg("rect", { x: i + 0.06, width: 0.88, y: 1 - height, height }, title);
    });
    const drawing = svg("svg", { viewBox: `0 0 ${bins.length} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...rects);
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

  const pickValue = (task, value) => ({ key: `${task}\u0000${value}`, go: () => applyFilters({ value: state.value && state.value.task === task && state.value.value === value ? null : { task, value } }, true) });

  function renderDistribution(task, at) {
    const { top, rest, distinct, max_missed } = task.values;
    const total = task.kind === "list" ? task.answered : task.answered + task.unanswered;
    if (task.kind === "record") return renderFields(task);
    if (task.kind === "text" && !top.some(([, count]) => count > 1)) return el("p.note", {}, top.length ? `${formatNumber(distinct ?? top.length)} different answers, each given once.` : "No answers.");
    const of = task.kind === "choices" ? orderChoices(task) : task.kind === "bool" ? [["Yes", count(top, "Yes")], ["No", count(top, "No")]] : top;
    if (task.kind === "int" && !rest && top.length > 1 && top.length <= 24) return renderColumns(task, at, top);
    const limit = task.kind === "text" ? 6 : 12;
    const most = Math.max(1, ...of.map(([, times]) => times));
    const bars = of.slice(0, limit).map(([value, times]) => renderBar(value, times, most, total, pickValue(at, value)));
    const others = rest + of.slice(limit).reduce((sum, [, times]) => sum + times, 0);
    const notes = [];
    if (others) notes.push(`${formatNumber(others)} others${distinct === null ? "" : `, ${formatNumber(distinct - Math.min(limit, of.length))} different`}`);
    if (task.unanswered) notes.push(`${formatNumber(task.unanswered)} without a valid answer`);
    if (max_missed) notes.push(`counts are too low by at most ${formatNumber(max_missed)}`);
    const histogram = task.histogram ? renderHistogram(task.histogram, "Values", (value) => formatNumber(value)) : "";
    return el("div", {}, histogram, task.kind === "list" ? el("div.label", {}, el("span", {}, "Most frequent"), el("span", {}, "share of answers")) : "", el(task.kind === "text" ? "div.bars.long" : "div.bars", {}, bars), notes.length ? el("p.note", {}, notes.join("; ")) : "");
  }

  const count = (top, key) => (top.find(([value]) => value === key) || [key, 0])[1];
  const orderChoices = (task) => task.choices.map((choice) => [choice, count(task.values.top, choice)]).sort((a, b) => (task.choices.length > 12 ? b[1] - a[1] : 0));

  function renderColumns(task, at, top) {
    const sorted = [...top].sort((a, b) => Number(a[0]) - Number(b[0]));
    const most = Math.max(...sorted.map(([, times]) => times));
    return el("div.columns", {}, sorted.map(([value, times]) => {
      const pick = pickValue(at, value);
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

  function renderPanel(task, at) {
    const flags = statistics.flags.top.filter(([flag]) => flag.startsWith(`${task.name}:`));
    const confidence = task.choices.length ? renderHistogram(task.confidence, "Confidence", formatRounded) : renderHistogram(task.confidence, "Log-probability per token", (value) => (Math.abs(value) < 1e-9 ? "0" : value.toFixed(task.confidence.start < -0.5 ? 2 : 3).replace("-", "−")));
    const about = task.about || {};
    return el(tasks.length === 1 ? "article.panel.wide" : "article.panel", {},
      el("div.title", {}, el("h3", {}, task.name), task.kind === task.name ? "" : el("span.pill", {}, task.kind), el("span.end", {}, `${formatNumber(task.answered)} answers`)),
      about.prompt ? el("p.prompt.text", { title: about.prompt }, about.prompt) : "",
      el("div.body", {}, renderDistribution(task, at), el("div.body", {},
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

  // ---- The contact sheet

  const haystack = rows.map((row) => [row.id, row.uri, row.prompt, row.error, ...row.flags, ...row.answers.flatMap((answer) => [toText(answer.value), answer.text, answer.truth]), ...row.kept.map(toText)].filter(Boolean).join("\n").toLowerCase());
  const findTask = (name) => tasks.findIndex((task) => task.name === name);
  const minConfidence = (row) => Math.min(2, ...row.answers.filter((_, i) => state.task === "" || i === findTask(state.task)).map((answer) => answer.confidence ?? 2));

  function matchesFilters(row, at) {
    return (!state.group || row.groups.includes(state.group)) && (!state.flag || row.flags.includes(state.flag)) && (!state.reason || row.reason === state.reason)
      && (!state.value || hasValue(row.answers[state.value.task], state.value.value)) && state.text.toLowerCase().split(/\s+/).every((word) => haystack[at].includes(word));
  }

  function renderMarks(row) {
    const wrong = row.answers.filter((answer) => answer.wrong).length;
    const flags = [...new Set(row.flags.map((flag) => (run.has_tasks ? flag : flag.split(":")[1])))];
    return el("div.marks", {}, row.status === "error" ? el("span.pill.bad", {}, row.stage || "error") : "", wrong ? el("span.pill.bad", {}, "wrong") : "", flags.slice(0, 3).map((flag) => el("span.pill.warn", {}, flag)), flags.length > 3 ? el("span.pill.warn", {}, `+${flags.length - 3}`) : "");
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
    if (missing || !images.length) return el("div.frame", {}, el("span.missing.text", {}, row.status === "error" ? "not readable" : missing || "no image"), renderMarks(row));
    if (images.length === 1 && images[0].time_s === undefined) return el("div.frame", {}, renderImage(images[0]), renderMarks(row));
    const strip = el("div.film-strip", {}, images.map((image, i) => el("div", {}, renderImage(image), image.time_s === undefined ? (more && i === images.length - 1 ? el("span", {}, `+${more}`) : "") : el("span", {}, formatClock(image.time_s)))));
    strip.style.setProperty("grid-template-columns", `repeat(${Math.min(images.length, images.length > 6 ? Math.ceil(images.length / 2) : 6)}, 1fr)`);
    return el("div.frame", {}, strip, renderMarks(row));
  }

  function renderCardAnswers(row) {
    if (row.status === "error") return el("div.answers", {}, el("span.free.soft", { title: row.error }, row.error));
    const only = state.task === "" ? -1 : findTask(state.task);
    if (tasks.length === 1 || only >= 0) {
      const at = Math.max(0, only);
      const answer = row.answers[at];
      return el(answer.wrong ? "div.answers.wrong" : "div.answers", {}, el("span.free.text.value", {}, toText(answer.value) || answer.text || "(empty)"), answer.wrong ? el("span.free.soft", {}, `truth: ${answer.truth}`) : "");
    }
    return el("div.answers", {}, tasks.map((task, i) => {
      const answer = row.answers[i];
      return el(answer.wrong ? "div.one.wrong" : "div.one", {}, el("span.key", { title: task.name }, task.name), el("span.value", { title: toText(answer.value) || answer.text }, answer.value === null ? "–" : toText(answer.value) || "(empty)"), renderMeter(answer.confidence));
    }));
  }

  function renderCard(row, at) {
    const film = row.media.images && row.media.images.length > 1;
    const name = row.id.split("/").pop() || row.id;
    const confidence = tasks.length === 1 || state.task ? minConfidence(row) : 2;
    return el(film ? "div.card.film" : "div.card", { tabindex: "0", role: "button", "data-at": at, "aria-label": `Row ${row.row}: ${name}` },
      renderFrame(row), renderCardAnswers(row), el("div.foot", {}, el("span.name", { title: row.id }, el("bdi", {}, name)), confidence <= 1 ? [formatRounded(confidence), renderMeter(confidence)] : ""));
  }

  function renderSelect(label, options, value, onPick) {
    const element = el("select", { "aria-label": label, onchange: (event) => onPick(event.target.value) }, options.map(([key, text]) => el("option", { value: key }, text)));
    element.value = value;
    return element;
  }

  function listValues() {
    const counts = new Map();
    const wanted = tasks.map((task, i) => i).filter((i) => tasks[i].kind !== "record" && (state.task === "" || i === findTask(state.task)));
    for (const i of wanted) {
      for (const row of rows) {
        const { value } = row.answers[i];
        if (value === null || (tasks[i].kind === "text" && toText(value).length > 60)) continue;
        for (const item of Array.isArray(value) ? value : [value]) {
          const key = JSON.stringify([i, toText(item)]);
          counts.set(key, (counts.get(key) || 0) + 1);
        }
      }
    }
    const entries = [...counts].sort((a, b) => JSON.parse(a[0])[0] - JSON.parse(b[0])[0] || b[1] - a[1]).slice(0, 300);
    if (state.value && !counts.has(JSON.stringify([state.value.task, state.value.value]))) entries.unshift([JSON.stringify([state.value.task, state.value.value]), 0]);
    return entries.map(([key, times]) => { const [i, value] = JSON.parse(key); return [key, `${tasks.length > 1 && state.task === "" ? `${tasks[i].name}: ` : ""}${value.slice(0, 60)} (${times})`]; });
  }

  function renderTools() {
    const count = (group) => rows.filter((row) => !group || row.groups.includes(group)).length;
    const groups = ["", ...Object.keys(GROUPS).filter((group) => count(group))];
    const flags = [...new Set(rows.flatMap((row) => row.flags))].filter((flag) => state.task === "" || flag.startsWith(`${state.task}:`)).sort();
    const search = el("input", { type: "search", id: "search", placeholder: "Search ids, answers, errors   /", "aria-label": "Search", autocomplete: "off", oninput: (event) => { state.text = event.target.value; renderCards(); } });
    search.value = state.text;
    byId("tools").replaceChildren(
      el("div.groups", { role: "group", "aria-label": "Group" }, groups.map((group) => el("button", { type: "button", "data-group": group, "aria-pressed": String(state.group === group), onclick: () => applyFilters({ group, order: group === "unsure" ? "unsure" : "row" }) }, group ? GROUPS[group] : "All", el("small", {}, formatNumber(count(group)))))),
      tasks.length > 1 ? renderSelect("Task", [["", "All tasks"], ...tasks.map((task) => [task.name, task.name])], state.task, (task) => applyFilters({ task, flag: "", value: null })) : "",
      renderSelect("Value", [["", "Any value"], ...listValues()], state.value ? JSON.stringify([state.value.task, state.value.value]) : "", (key) => { const pair = key && JSON.parse(key); applyFilters({ value: pair ? { task: pair[0], value: pair[1] } : null }); }),
      flags.length ? renderSelect("Flag", [["", "Any flag"], ...flags.map((flag) => [flag, flag])], state.flag, (flag) => applyFilters({ flag })) : "",
      renderSelect("Order", [["row", "By row"], ["unsure", "Least confident first"], ["sure", "Most confident first"]], state.order, (order) => applyFilters({ order })),
      search,
      el("button.clear", { type: "button", onclick: () => applyFilters({ group: "", task: "", flag: "", value: null, reason: "", text: "" }) }, "Clear"),
      el("span.end", { id: "count", "aria-live": "polite" }),
    );
  }

  function applyFilters(changes, scroll = false) {
    Object.assign(state, changes);
    renderTools();
    renderCards();
    const pressed = state.value ? pickValue(state.value.task, state.value.value).key : state.reason ? `reason\u0000${state.reason}` : null;
    for (const button of document.querySelectorAll("[data-pick]")) button.setAttribute("aria-pressed", String(button.dataset.pick === pressed));
    if (scroll) byId("sheet").scrollIntoView({ block: "start" });
  }

  function renderCards() {
    shown = rows.filter(matchesFilters);
    if (state.order !== "row") shown = shown.map((row) => [minConfidence(row), row]).sort((a, b) => (state.order === "sure" ? (b[0] > 1 ? -1 : b[0]) - (a[0] > 1 ? -1 : a[0]) : a[0] - b[0])).map(([, row]) => row);
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

  // ---- One row

  function renderAnswer(task, answer, flags) {
    const scores = answer.scores && typeof answer.scores === "object" ? Object.entries(answer.scores).sort((a, b) => b[1] - a[1]) : null;
    const value = task.kind === "list" && answer.value ? el("div.chips", {}, answer.value.map((item) => el("span.pill.text", {}, toText(item)))) : task.kind === "record" && answer.value ? el("pre.text", {}, JSON.stringify(answer.value, null, 1)) : el("div.value.text", {}, answer.value === null ? "no valid answer" : toText(answer.value) || "(empty)");
    const differs = answer.text && answer.text !== toText(answer.value) && !(task.kind === "record" && answer.value);
    return el(answer.wrong ? "div.answer.wrong" : "div.answer", {},
      el("div.title", {}, el("h3", {}, task.name), answer.truth === null ? "" : answer.wrong ? el("span.pill.bad", {}, `truth: ${answer.truth}`) : el("span.pill.good", {}, "correct"),
        flags.filter((flag) => flag.startsWith(`${task.name}:`)).map((flag) => el("span.pill.warn", {}, flag.slice(task.name.length + 1))),
        el("span.end", {}, answer.confidence === null ? "" : [scores ? formatRounded(answer.confidence) : `${formatRounded(answer.confidence)} per token (log ${formatRounded(answer.scores)})`, " ", renderMeter(answer.confidence)])),
      value,
      scores && scores.length > 1 ? el("div.bars", {}, scores.slice(0, 12).map(([name, probability]) => el("div.row", {}, el("span.name", {}, name), el("span.track", {}, setShare(el("div.fill"), "width", probability || 0)), el("span.count", {}, (probability || 0).toFixed(3))))) : "",
      differs ? el("pre.text", {}, answer.text) : "",
      answer.alternative ? el("div", {}, el("div.label", {}, el("span", {}, `Alternative answer, not chosen${answer.alternative.finish_reason ? ` (${answer.alternative.finish_reason})` : ""}`)), el("pre.text", {}, toText(answer.alternative.text))) : "");
  }

  function renderFacts(row) {
    const [images, tiles, prompt, output] = row.counts;
    const pairs = [["id", row.id], ["uri", row.uri], ["row", formatNumber(row.row)], ["prompt", row.prompt], ["size", `${formatNumber(images)} image${images === 1 ? "" : "s"}, ${formatNumber(tiles)} tiles, ${formatNumber(prompt)} prompt and ${formatNumber(output)} output tokens`], ["finish reason", row.status === "ok" ? row.answers.map((answer) => answer.finish).join(", ") : ""], ["frames at", row.timestamps_s.map(formatClock).join(", ")], ["groups", row.groups.map((group) => GROUPS[group].toLowerCase()).join(", ")], ...kept.map((name, i) => [name, toText(row.kept[i])])];
    return el("dl", {}, pairs.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd.text", {}, value)]));
  }

  function openRow(at) {
    opened = at;
    const row = shown[at];
    const { images, missing, more } = row.media;
    const dialog = byId("details");
    const step = (by) => () => { if (shown[opened + by]) openRow(opened + by); };
    dialog.replaceChildren(
      el("div.bar", {}, el("span.name", { title: row.id }, row.id), el("span.soft", {}, `${at + 1} of ${formatNumber(shown.length)}`), el("button", { type: "button", title: "Previous (left arrow)", disabled: at === 0, onclick: step(-1) }, "←"), el("button", { type: "button", title: "Next (right arrow)", disabled: at === shown.length - 1, onclick: step(1) }, "→"), el("button", { type: "button", id: "close", title: "Close (Escape)", onclick: () => dialog.close() }, "×")),
      el("div.open", {},
        el(images && images.length === 1 ? "div.media.single" : "div.media", {}, missing ? el("span.missing.text", {}, missing) : images.map((image) => el("figure", {}, renderImage(image, false), image.time_s === undefined ? "" : el("figcaption", {}, formatClock(image.time_s)))), more ? el("span.missing", {}, `and ${formatNumber(more)} more`) : ""),
        el("div.facts", {}, row.status === "error" ? el("p.error.text", {}, `${row.stage}: ${row.error}`) : tasks.map((task, i) => renderAnswer(task, row.answers[i], row.flags)), renderFacts(row))),
    );
    if (!dialog.open) dialog.showModal();
    byId("close").focus();
  }

  // ---- About this run

  /** Accuracy of reviewed answers: a line per task, with the interval that holds the true one in 19 of 20 cases. */
  function renderReview() {
    if (!(data.review || []).length) return;
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    const line = (each) => [el("dt", {}, each.task), el("dd.text", {}, `${percent(each.accuracy)} right (${each.right} of ${each.reviewed} reviewed; 95 % interval ${percent(each.low)} to ${percent(each.high)})${each.error === null ? "" : `, calibration error ${each.error.toFixed(3)}`}`)];
    byId("tasks").before(el("section", { id: "review" }, el("h2", {}, "Reviewed by people"), el("div.panel", {}, el("dl", {}, data.review.flatMap(line)))));
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

  // ---- Keys: / searches, arrow keys move, Enter opens a row, Escape closes it

  const cards = byId("cards");
  const countPerRow = () => { const all = [...cards.children]; const top = all[0].offsetTop; const next = all.findIndex((item) => item.offsetTop !== top); return next < 0 ? all.length : next; };

  cards.addEventListener("click", (event) => { const item = event.target.closest(".card"); if (item) openRow(Number(item.dataset.at)); });
  cards.addEventListener("keydown", (event) => {
    const at = [...cards.children].indexOf(event.target);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: countPerRow(), ArrowUp: -countPerRow() };
    if (at >= 0 && event.key in steps && cards.children[at + steps[event.key]]) { event.preventDefault(); cards.children[at + steps[event.key]].focus(); }
    if (at >= 0 && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); openRow(at); }
  });
  document.addEventListener("keydown", (event) => {
    if (byId("details").open) {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by && shown[opened + by]) { event.preventDefault(); openRow(opened + by); }
    } else if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) { event.preventDefault(); byId("search").focus(); }
  });
  byId("details").addEventListener("click", (event) => { if (event.target === byId("details")) byId("details").close(); });
  byId("details").addEventListener("close", () => { if (cards.children[opened]) cards.children[opened].focus({ preventScroll: true }); });

  byId("more").addEventListener("click", appendCards);
  new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) appendCards(); }, { rootMargin: "600px" }).observe(byId("more"));

  renderHead();
  renderSummary();
  renderReview();
  byId("sheet").prepend(el("h2", {}, "Contact sheet", el("small.hint", {}, rows.length < statistics.rows ? `a sample of ${formatNumber(rows.length)} rows` : "all rows")));
  renderTools();
  renderCards();
  renderAbout();
})();
