// A probability between 0 and 1, with the threshold and the band in which decisions are not to be trusted.
import { decimals, h } from "./dom.js";

/** A picture with the same said in words. */
export function scale({ probability, threshold, band, label }) {
  const isWide = band && band[1] > band[0];
  const range = band && `${decimals(band[0])} to ${decimals(band[1])}`;
  const words = [`Probability of ${label} ${decimals(probability)}`, `threshold ${decimals(threshold)}`];
  if (isWide) words.push(`uncertain from ${range}`);
  const line = h("div", { class: "scale-line" });
  if (isWide) line.append(placed("scale-band", band[0], band[1] - band[0]));
  line.append(placed("scale-threshold", threshold), placed("scale-point", probability));
  return h(
    "div",
    { class: "scale", role: "img", "aria-label": words.join(", ") },
    h("div", { class: "scale-above" }, mark("scale-value", probability, decimals(probability))),
    h("span", { class: "scale-end" }, "0"),
    line,
    h("span", { class: "scale-end" }, "1"),
    h("div", { class: "scale-below" }, mark("scale-word", threshold, `threshold ${decimals(threshold)}`)),
    isWide && h("p", { class: "scale-key" }, h("span", { class: "swatch" }), `uncertain, ${range}`),
  );
}

function placed(name, at, width) {
  const element = h("span", { class: name });
  element.style.left = `${100 * at}%`;
  if (width !== undefined) element.style.width = `${100 * width}%`;
  return element;
}

/** A word at its place that stays inside the line: it hangs to its left the more, the further right it is. */
function mark(name, at, text) {
  const element = h("span", { class: name }, text);
  element.style.left = `${100 * at}%`;
  element.style.transform = `translateX(${-100 * at}%)`;
  return element;
}
