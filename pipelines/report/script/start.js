// ---- Keys: / searches, j and k or the arrow keys move, Enter opens a row, Escape closes it

const cards = byId("cards");
const KEYS = [[["/"], "searches"], [["j", "k", "arrow keys"], "move"], [["Enter"], "opens a row"], [["Esc"], "closes it"]];
const isField = (element) => /^(INPUT|SELECT|TEXTAREA)$/.test(element.tagName);

function countPerRow() {
  const all = [...cards.children];
  const next = all.findIndex((item) => item.offsetTop !== all[0].offsetTop);
  return next < 0 ? all.length : next;
}

function focusCard(at, options) {
  while (at >= cards.children.length && cards.children.length < shown.length) appendCards();
  if (shown[at]) cards.children[at].focus(options);
}

/** Return by how many rows a key moves, 0 for other keys. */
function readStep(key) {
  const down = () => (byId("details").open ? 0 : countPerRow());
  return { j: () => 1, ArrowRight: () => 1, k: () => -1, ArrowLeft: () => -1, ArrowDown: down, ArrowUp: () => -down() }[key]?.() ?? 0;
}

function moveInSheet(event) {
  const at = [...cards.children].indexOf(event.target.closest?.(".card"));
  const step = readStep(event.key);
  if (at >= 0 && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); openRow(at); }
  else if (at >= 0 && step) { event.preventDefault(); focusCard(at + step); }
  else if (/^[jk]$/.test(event.key)) focusCard([...cards.children].findIndex((card) => card.tabIndex === 0));
  else if (event.key === "/") { event.preventDefault(); byId("search").focus(); }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (byId("details").open) {
    const step = readStep(event.key);
    if (step && shown[opened + step]) { event.preventDefault(); openRow(opened + step); }
  } else if (event.target.id === "search" && event.key === "Enter") focusCard(0);
  else if (!isField(event.target)) moveInSheet(event);
});
cards.addEventListener("click", (event) => { const item = event.target.closest(".card"); if (item) openRow(Number(item.dataset.at)); });
// The Tab key reaches one card, the last one that had the focus, and leaves the sheet with the next press.
cards.addEventListener("focusin", (event) => {
  for (const card of cards.querySelectorAll("[tabindex='0']")) card.tabIndex = -1;
  event.target.tabIndex = 0;
});
byId("details").addEventListener("click", (event) => { if (event.target === byId("details")) byId("details").close(); });
byId("details").addEventListener("close", () => { history.replaceState(null, "", location.href.split("#")[0]); focusCard(opened, { preventScroll: true }); });
addEventListener("hashchange", openLinked);

byId("more").addEventListener("click", appendCards);
new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) appendCards(); }, { rootMargin: "600px" }).observe(byId("more"));

renderHead();
renderSummary();
renderReview();
byId("sheet").prepend(
  el("h2", {}, "Contact sheet", el("small", {}, rows.length < statistics.rows ? `a sample of ${formatNumber(rows.length)} rows` : "all rows")),
  el("p.note.keys", {}, KEYS.map(([names, does]) => el("span", {}, names.map((name) => [el("kbd", {}, name), " "]), does))),
  el("p", { id: "notice", role: "status" }));
renderTools();
renderCards();
renderAbout();
openLinked();
