// ---- Filters: groups, flags, reasons, words, and the values of typed columns

const MANY_VALUES = 60; // of a column; more of them are searched, not listed
const byName = new Map(data.filters.map((column) => [column.name, column]));

/** Return the values of a column in a row, without nulls: several for a list or for fields of records in a list. */
function readValues(row, place) {
  const step = (value, key) => (Array.isArray(value) && typeof key === "string" ? value.map((item) => step(item, key)) : value !== null && Object.hasOwn(Object(value), key) ? value[key] : null);
  const found = place.reduce(step, row);
  return (Array.isArray(found) ? found.flat(Infinity) : [found]).filter((value) => value !== null);
}

const FITS = {
  number: (value, { from, to }) => (from === "" || Number(value) >= Number(from)) && (to === "" || Number(value) <= Number(to)),
  date: (value, { from, to }) => { const day = String(value).slice(0, 10); return (from === "" || day >= from) && (to === "" || day <= to); },
  // A bar's value may be the start of a long one.
  text: (value, { is, part }) => { const text = toText(value); return (is === null || text === is || (is.length >= 200 && text.startsWith(is))) && text.toLowerCase().includes(part.toLowerCase()); },
};
const EMPTY = { from: "", to: "", is: null, part: "" };
const isEmpty = (wanted) => Object.keys(EMPTY).every((key) => wanted[key] === EMPTY[key]);
const isRange = (column) => column.type === "number" || column.type === "date";

function matchesColumn(row, name, wanted) {
  const column = byName.get(name);
  return isEmpty(wanted) || readValues(row, column.place).some((value) => FITS[isRange(column) ? column.type : "text"](value, wanted));
}

function matchesFilters(row, at) {
  return (!state.group || isInGroup(row, state.group)) && (!state.flag || row.flags.includes(state.flag)) && (!state.reason || row.reason === state.reason)
    && Object.entries(state.columns).every(([name, wanted]) => matchesColumn(row, name, wanted))
    && state.text.toLowerCase().split(/\s+/).every((word) => haystack[at].includes(word));
}

const isInGroup = (row, group) => (group === "similar" ? row.similar !== null : row.groups.includes(group));

/** Return what a bar of the summary filters by: `go` turns the filter on or off. */
function pickValue(task, value) {
  const key = JSON.stringify([task.name, value]);
  const wanted = isRange(byName.get(task.name)) ? { ...EMPTY, from: value, to: value } : { ...EMPTY, is: value };
  return { key, go: () => applyFilters({ columns: listPicked().includes(key) ? {} : { [task.name]: wanted } }, true) };
}

/** Return the keys of the bars that the filters stand for. */
function listPicked() {
  const values = Object.entries(state.columns).map(([name, wanted]) => [name, wanted.is !== null ? wanted.is : wanted.from === wanted.to ? wanted.from : ""]);
  return [...values.filter(([, value]) => value !== "").map((pair) => JSON.stringify(pair)), state.reason ? `reason\u0000${state.reason}` : ""];
}

function renderSelect(label, options, value, onPick) {
  const element = el("select", { "aria-label": label, onchange: (event) => onPick(event.target.value) }, options.map(([key, text]) => el("option", { value: key }, text)));
  element.value = value;
  return element;
}

// ---- A filter of one column

function renderFilter(name) {
  const column = byName.get(name);
  const parts = isRange(column) ? [renderLimit(column, "from"), renderLimit(column, "to")] : [renderWanted(column)];
  const remove = () => { const { [name]: removed, ...columns } = state.columns; applyFilters({ columns }); };
  return el("div.filter", { role: "group", "aria-label": `Filter ${name}` }, el("span.mono", {}, name), parts, el("button.plain", { type: "button", "aria-label": `Remove the filter ${name}`, onclick: remove }, "×"));
}

function change(name, changes) {
  state.columns[name] = { ...state.columns[name], ...changes };
  renderCards();
  markPicked();
}

function renderLimit(column, end) {
  const input = el("input", { type: column.type, step: column.type === "number" ? "any" : null, "aria-label": `${column.name} ${end}`, oninput: (event) => change(column.name, { [end]: event.target.value }) });
  input.value = state.columns[column.name][end];
  return el("label", {}, `${end} `, input);
}

function renderWanted(column) {
  const { is, part } = state.columns[column.name];
  const counts = new Map(is === null ? [] : [[is, 0]]);
  for (const row of rows) for (const text of new Set(readValues(row, column.place).map(toText))) counts.set(text, (counts.get(text) || 0) + 1);
  if (counts.size <= MANY_VALUES || is !== null) {
    const options = [...counts].sort((a, b) => b[1] - a[1]).slice(0, MANY_VALUES);
    if (is !== null && !options.some(([text]) => text === is)) options.push([is, counts.get(is)]);
    return renderSelect(`${column.name} is`, [["", "any"], ...options.map(([text, times]) => [JSON.stringify(text), `${text.slice(0, 60) || "(empty)"} (${times})`])], is === null ? "" : JSON.stringify(is), (key) => change(column.name, { is: key ? JSON.parse(key) : null }));
  }
  const input = el("input", { type: "search", placeholder: "contains", "aria-label": `${column.name} contains`, oninput: (event) => change(column.name, { part: event.target.value }) });
  input.value = part;
  return input;
}

function renderAddFilter() {
  const add = (name) => { applyFilters({ columns: { ...state.columns, [name]: EMPTY } }); [...document.querySelectorAll(".filter")].at(-1).querySelector("input, select").focus(); };
  const names = data.filters.map((column) => column.name).filter((name) => !(name in state.columns));
  return renderSelect("Filter by column", [["", "Filter by …"], ...names.map((name) => [name, `${name} (${byName.get(name).type})`])], "", add);
}

// ---- The bar of all filters

function renderGroup(group) {
  const times = rows.filter((row) => !group || isInGroup(row, group)).length;
  const go = () => applyFilters({ group, order: ["unsure", "similar"].includes(group) ? group : "row" });
  return el("button", { type: "button", "data-group": group, "aria-pressed": String(state.group === group), onclick: go }, group ? GROUPS[group] : "All", el("small", {}, formatNumber(times)));
}

function renderTools() {
  const groups = ["", ...Object.keys(GROUPS).filter((group) => rows.some((row) => isInGroup(row, group)))];
  const flags = [...new Set(rows.flatMap((row) => row.flags))].filter((flag) => state.task === "" || flag.startsWith(`${state.task}:`)).sort();
  const search = el("input", { type: "search", id: "search", placeholder: "Search ids, answers, errors   /", "aria-label": "Search", autocomplete: "off", oninput: (event) => { state.text = event.target.value; renderCards(); } });
  search.value = state.text;
  byId("tools").replaceChildren(
    el("div.groups", { role: "group", "aria-label": "Group" }, groups.map(renderGroup)),
    search,
    tasks.length > 1 ? renderSelect("Task", [["", "All tasks"], ...tasks.map((task) => [task.name, task.name])], state.task, (task) => applyFilters({ task, flag: "" })) : "",
    flags.length ? renderSelect("Flag", [["", "Any flag"], ...flags.map((flag) => [flag, flag])], state.flag, (flag) => applyFilters({ flag })) : "",
    renderSelect("Order", [["row", "By row"], ["unsure", "Least confident first"], ["sure", "Most confident first"], ...(groups.includes("similar") ? [["similar", "Similar pictures together"]] : [])], state.order, (order) => applyFilters({ order })),
    ...Object.keys(state.columns).map(renderFilter),
    renderAddFilter(),
    el("button.plain.clear", { type: "button", onclick: () => applyFilters({ ...NO_FILTERS }) }, "Clear"),
    el("span.end", {}, el("span", { id: "count", "aria-live": "polite" }), " ", renderExport()),
  );
}

function markPicked() {
  const picked = listPicked();
  for (const button of document.querySelectorAll("[data-pick]")) button.setAttribute("aria-pressed", String(picked.includes(button.dataset.pick)));
}

function applyFilters(changes, scroll = false) {
  Object.assign(state, changes);
  renderTools();
  renderCards();
  markPicked();
  if (scroll) byId("sheet").scrollIntoView({ block: "start" });
}
