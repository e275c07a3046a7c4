// Elements and numbers as text. Whatever comes from a server or a file is set as text, never as HTML.

/** h("p", {class: "quiet", onclick: f}, "text", element): an element. A false or null attribute or child is none. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  const kept = children.flat(2).filter((child) => child !== null && child !== undefined && child !== false);
  element.append(...kept);
  return element;
}

/** A table of texts or elements, whose first column heads its rows. It can be scrolled where it is too wide. */
export function table(head, rows, label) {
  const column = (cell) => (cell.length ? h("th", { scope: "col" }, cell) : h("td"));
  const cell = (each, place) => (place ? h("td", {}, each) : h("th", { scope: "row" }, each));
  const body = rows.map((row) => h("tr", {}, row.map(cell)));
  const whole = h("table", {}, h("thead", {}, h("tr", {}, head.map(column))), h("tbody", {}, body));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, whole);
}

/** The element with an id. */
export const byId = (id) => document.getElementById(id);

/** 0.1234 -> "0.123"; nothing -> "". */
export const decimals = (value, digits = 3) => (typeof value === "number" ? value.toFixed(digits) : "");

let made = 0;
/** An id that nothing else has. */
export const newId = (word) => `${word}-${(made += 1)}`;
