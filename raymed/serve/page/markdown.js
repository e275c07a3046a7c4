// A model card, written in Markdown, as elements: headings, paragraphs, lists, tables, **bold**, *italic* and `code`.
// Whatever else stands in it, HTML and links included, is shown as the text that it is.
import { h, table } from "./dom.js";

/** Elements of a text; its headings begin at h2. */
export function markdown(text) {
  const lines = text.split(/\r?\n/);
  const made = [];
  while (lines.length) made.push(block(lines));
  return made.filter(Boolean);
}

/** The next block, taken off the lines. */
function block(lines) {
  const first = lines.shift();
  if (!first.trim()) return null;
  const heading = /^(#{1,5})\s+(.*)/.exec(first);
  if (heading) return h(`h${heading[1].length + 1}`, {}, inline(heading[2]));
  if (first.startsWith("|")) return tableOf([first, ...taken(lines, (line) => line.startsWith("|"))]);
  if (/^[-*] /.test(first)) return list(first, lines);
  const rest = taken(lines, (line) => line.trim() && !/^(#{1,5}\s|\||[-*] )/.test(line));
  return h("p", {}, inline([first, ...rest].join(" ")));
}

function taken(lines, wanted) {
  const found = [];
  while (lines.length && wanted(lines[0])) found.push(lines.shift());
  return found;
}

function list(first, lines) {
  const items = [first.slice(2)];
  for (const line of taken(lines, (next) => /^([-*] |  \S)/.test(next))) {
    if (/^[-*] /.test(line)) items.push(line.slice(2));
    else items[items.length - 1] += ` ${line.trim()}`;
  }
  return h("ul", {}, items.map((item) => h("li", {}, inline(item))));
}

function tableOf(lines) {
  const [head, ...rows] = lines.filter((line) => !/^[|\s:-]+$/.test(line)).map(cellsOf);
  return table(head.map(inline), rows.map((row) => row.map(inline)), head[0] || "Table");
}

/** `| a | b \\| c |` -> ["a", "b | c"] */
function cellsOf(row) {
  const cells = row.trim().replaceAll("\\|", "\u0000").split("|").slice(1, -1);
  return cells.map((cell) => cell.replaceAll("\u0000", "|").trim());
}

function inline(text) {
  const parts = text.split(/(`[^`]*`|\*\*[^*]+\*\*|\*[^*\s][^*]*\*)/);
  return parts.map((part) => {
    if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) return h("code", {}, part.slice(1, -1));
    if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) return h("strong", {}, part.slice(2, -2));
    if (part.length > 2 && part.startsWith("*") && part.endsWith("*")) return h("em", {}, part.slice(1, -1));
    return part;
  });
}
