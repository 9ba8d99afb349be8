"""Measure the contrast of what a page shows, as WCAG 2.2 defines it: text (1.4.3) and edges of controls (1.4.11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SCRIPT = r"""
const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
const brush = canvas.getContext("2d", { willReadFrequently: true });
const known = new Map();

function read(colour) { // [red, green, blue, alpha], each 0 to 1, of any CSS colour
  if (!known.has(colour)) {
    brush.clearRect(0, 0, 1, 1);
    brush.fillStyle = colour;
    brush.fillRect(0, 0, 1, 1);
    known.set(colour, [...brush.getImageData(0, 0, 1, 1).data].map((value) => value / 255));
  }
  return known.get(colour);
}
const lay = (over, under) => [0, 1, 2].map((i) => over[i] * over[3] + under[i] * (1 - over[3])).concat(1);
const listAncestors = (element) => (element ? [element, ...listAncestors(element.parentElement)] : []);
const readBackground = (element) => listAncestors(element).reverse()
  .reduce((under, one) => lay(read(getComputedStyle(one).backgroundColor), under), [1, 1, 1, 1]);
const readOpacity = (element) => listAncestors(element).reduce((all, one) => all * getComputedStyle(one).opacity, 1);

function luminance([red, green, blue]) {
  const [r, g, b] = [red, green, blue].map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function compare(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
const isShown = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true })
  && !element.closest(":disabled, option, noscript, script, style");

function measureText(element, style, text) {
  const [under, [red, green, blue, alpha]] = [readBackground(element), read(style.color)];
  const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const ratio = compare(lay([red, green, blue, alpha * readOpacity(element)], under), under);
  const of = `${element.tagName} ${element.className}`;
  return { what: text.trim().slice(0, 40), of, ratio, needed: isLarge ? 3 : 4.5 };
}
function* measureTexts() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (node.data.trim() && isShown(element)) yield measureText(element, getComputedStyle(element), node.data);
  }
  for (const field of document.querySelectorAll("input, textarea, select")) {
    if (!isShown(field)) continue;
    yield measureText(field, getComputedStyle(field), `value of ${field.ariaLabel}`);
    if (field.placeholder) yield measureText(field, getComputedStyle(field, "::placeholder"), field.placeholder);
  }
}
function* measureEdges() {
  for (const field of document.querySelectorAll("input, textarea, select")) {
    if (!isShown(field)) continue;
    const ratio = compare(read(getComputedStyle(field).borderTopColor), readBackground(field.parentElement));
    yield { what: `edge of ${field.ariaLabel}`, of: field.tagName, ratio, needed: 3 };
  }
}
return [...measureTexts(), ...measureEdges()];
"""


@dataclass(frozen=True)
class Contrast:
    """The contrast of one text or edge, and the least that WCAG's level AA asks for."""

    what: str
    of: str
    ratio: float
    needed: float


def measure_contrasts(driver: Any) -> list[Contrast]:
    """Return the contrast of every text, placeholder and edge of a field that the page shows now."""
    return [Contrast(**found) for found in driver.execute_script(_SCRIPT)]


def find_weak(driver: Any) -> list[Contrast]:
    """Return those below level AA. Raise AssertionError if the page shows no text at all."""
    found = measure_contrasts(driver)
    assert found
    return [contrast for contrast in found if contrast.ratio < contrast.needed]
