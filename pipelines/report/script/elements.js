const data = JSON.parse(document.getElementById("data").textContent);
const { run, statistics, rows, kept } = data;
const tasks = statistics.tasks;
const GROUPS = { random: "Random", unsure: "Least confident", flagged: "Flagged", wrong: "Wrong", errors: "Errors", similar: "Similar pictures" };
const NO_FILTERS = { group: "", task: "", flag: "", columns: {}, reason: "", text: "" };
const state = { ...NO_FILTERS, order: "row" };
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
