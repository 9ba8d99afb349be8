// ---- Export: the rows that match the filters, as a file that the page makes

const BYTE_ORDER_MARK = "\ufeff"; // without it, Excel does not read UTF-8

const FORMULA = /^\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|^[\t\r\n]/; // how one starts for some spreadsheet, in wide characters too
const PLAIN_NUMBER = /^-?\d+(\.\d+)?$/;

/** Return a field of CSV: nothing for null, "" for empty text. Text that could be a formula gets an apostrophe in front. */
function toField(value) {
  if (value === null || value === undefined) return "";
  const text = typeof value === "object" ? JSON.stringify(value) : String(value);
  const safe = typeof value !== "number" && FORMULA.test(text) && !PLAIN_NUMBER.test(text) ? `'${text}` : text;
  return /^$|^\s|\s$|[",\r\n]/.test(safe) ? `"${safe.replaceAll("\"", "\"\"")}"` : safe;
}

const EXPORTS = {
  csv: () => {
    const lines = [["id", "status", ...tasks.map((task) => task.name)], ...shown.map((row) => [row.id, row.status, ...row.answers.map((answer) => answer.value)])];
    return [BYTE_ORDER_MARK, ...lines.map((line) => `${line.map(toField).join(",")}\r\n`)];
  },
  json: () => [`${JSON.stringify(shown.map((row) => ({ id: row.id, row: row.row, status: row.status, answers: Object.fromEntries(tasks.map((task, i) => [task.name, row.answers[i].value])) })), null, 1)}\n`],
};

function saveShown(kind) {
  const url = URL.createObjectURL(new Blob(EXPORTS[kind](), { type: kind === "csv" ? "text/csv" : "application/json" }));
  el("a", { href: url, download: `${run.name}-${shown.length}-rows.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it after the click
}

function renderExport() {
  return Object.keys(EXPORTS).map((kind) => el("button.plain", { type: "button", title: `Save the ids and answers of the rows shown here as ${kind.toUpperCase()}`, onclick: () => saveShown(kind) }, kind.toUpperCase()));
}
