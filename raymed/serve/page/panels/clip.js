// A CLIP: classes that sentences describe, how well images and texts go together, and what lies nearest in an index.
import { decimals, h, newId, table } from "../dom.js";

const TASKS = { zero_shot: "Classes by sentences", embed: "Compare with texts", retrieve: "Search the index" };

export function fields(model) {
  const tasks = Object.keys(TASKS).filter((task) => model.tasks.includes(task));
  const name = newId("task");
  const radio = (value, place) => h("input", { type: "radio", name, value, checked: !place, "data-field": "task" });
  const radios = tasks.map(radio);
  const chosen = () => radios.find((each) => each.checked).value;
  const parts = { zero_shot: promptsPart(), embed: textsPart("Texts, one a line"), retrieve: searchPart() };
  const show = () => Object.entries(parts).forEach(([task, part]) => (part.element.hidden = task !== chosen()));
  const labels = radios.map((each) => h("label", {}, each, TASKS[each.value]));
  const tabs = h("fieldset", {}, h("legend", {}, "Task"), h("div", { class: "tabs" }, labels));
  tabs.addEventListener("change", show);
  show();
  return {
    element: h("div", {}, tabs, tasks.map((task) => parts[task].element)),
    read: () => ({ task: chosen(), ...parts[chosen()].read() }),
    ready: (files) => parts[chosen()].ready(files),
  };
}

/** Rows of a class and its sentences, two at least. */
function promptsPart() {
  const rows = h("div", {});
  const add = h("button", { type: "button", class: "add" }, "Add a class");
  const changed = () => {
    const few = rows.childElementCount <= 2;
    for (const button of rows.querySelectorAll("button")) button.disabled = few;
    rows.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const more = () => {
    const row = classRow(() => (row.remove(), add.focus(), changed()));
    rows.append(row);
    changed();
    return row;
  };
  add.addEventListener("click", () => more().querySelector("input").focus());
  more();
  more();
  const named = () =>
    [...rows.children].map((row) => [row.querySelector("input").value.trim(), linesOf(row.querySelector("textarea"))]);
  return {
    element: h("fieldset", {}, h("legend", { class: "unseen" }, "Classes"), rows, add),
    read: () => ({ prompts: distinct(named()) }),
    ready: (files) => files > 0 && named().every(([name, sentences]) => name && sentences.length),
  };
}

function classRow(remove) {
  const [name, text] = [newId("class"), newId("sentences")];
  const input = h("input", { id: name, autocomplete: "off", "data-field": "prompts" });
  const label = h("label", { for: text }, "Sentences that describe it, one a line");
  const drop = h("button", { type: "button", onclick: remove }, "Remove");
  const top = [h("div", {}, h("label", { for: name }, "Class"), input), drop];
  return h("div", { class: "row" }, h("div", { class: "row-top" }, top), label, h("textarea", { id: text, rows: 1 }));
}

function distinct(named) {
  const names = named.map(([name]) => name);
  const twice = names.find((name, place) => names.indexOf(name) !== place);
  if (twice) throw Object.assign(new Error(`Two classes are called ${twice}`), { field: "prompts" });
  return Object.fromEntries(named);
}

function textsPart(label) {
  const id = newId("texts");
  const area = h("textarea", { id, rows: 2, "data-field": "texts" });
  return {
    element: h("div", { class: "field" }, h("label", { for: id }, label), area),
    read: () => ({ texts: linesOf(area) }),
    ready: (files) => files > 0 && linesOf(area).length > 0,
  };
}

/** By the images on the light box, by texts, or by both. */
function searchPart() {
  const { element, read } = textsPart("Texts to search by, one a line, beside the images");
  const id = newId("k");
  const k = h("input", { id, type: "number", min: 1, max: 1000, value: 10, "data-field": "k" });
  return {
    element: h("div", {}, element, h("div", { class: "field" }, h("label", { for: id }, "How many of the nearest"), k)),
    read: () => ({ ...read(), k: k.value }),
    ready: (files) => files > 0 || read().texts.length > 0,
  };
}

const linesOf = (area) => area.value.split("\n").map((line) => line.trim()).filter(Boolean);

export function render(answer, model, asked) {
  return { zero_shot: zeroShot, embed: compared, retrieve: found }[answer.result.task](answer.result, asked);
}

function zeroShot({ probabilities, label, truncated, images }) {
  const several = images.length > 1;
  return {
    said: `Most probable of the classes: ${label}, ${decimals(probabilities[label])}.`,
    elements: [
      h("h3", {}, several ? `Mean of ${images.length} images` : "Which class the image goes with"),
      h("div", { class: "bars" }, Object.entries(probabilities).map(([name, share]) => bar(name, share, label))),
      note("They sum to 1 whatever the image shows: the right answer must be among them."),
      truncated && note("A sentence is longer than the model reads; its end does not count."),
    ],
    films: images.map(({ file, frame, ...image }) => ({
      file,
      frame,
      caption: several && h("p", {}, `${image.label} ${decimals(image.probabilities[image.label])}`),
    })),
  };
}

function bar(name, share, best) {
  const fill = h("span", { class: "fill" });
  fill.style.width = `${100 * share}%`;
  const [word, number] = [h("span", {}, name), h("span", { class: "number" }, decimals(share))];
  return h("div", { class: name === best ? "bar best" : "bar" }, word, number, h("span", { class: "track" }, fill));
}

function compared({ images, texts }, { texts: asked }) {
  const calibrated = images.some((image) => image.pair_probability);
  const head = ["Text", "cosine", ...(calibrated ? ["together"] : [])];
  const row = (image) => (text, place) => [
    texts[place].truncated ? `${text} (longer than the model reads)` : text,
    decimals(image.similarity[place]),
    ...(calibrated ? [decimals(image.pair_probability[place])] : []),
  ];
  const title = (image) => (images.length > 1 ? `${nameOf(image)} and the texts` : "The image and the texts");
  const ofImage = (image) => [h("h3", {}, title(image)), table(head, asked.map(row(image)), title(image))];
  const meaning = calibrated
    ? "together: the probability that they belong together, among pairs as likely matched as random."
    : "The model knows no calibration: cosines alone.";
  const cosines = (image) => asked.map((text, place) => `${text} ${decimals(image.similarity[place])}`).join(", ");
  return {
    said: images.map((image) => `${nameOf(image)}: ${cosines(image)}`).join(". "),
    elements: [...images.flatMap(ofImage), note(meaning)],
    films: [],
  };
}

function found({ images, texts }, { texts: asked }) {
  const queries = [
    ...images.map((image) => [nameOf(image), image.matches]),
    ...texts.map(({ text, matches }) => [`“${asked[text]}”`, matches]),
  ];
  const lists = queries.flatMap(([name, matches]) => [
    h("h3", {}, `Nearest to ${name}`),
    h("ol", { class: "matches" }, matches.map(match)),
  ]);
  const said = queries.map(([name, [first]]) => `Nearest to ${name}: ${first.caption}`).join(". ");
  return { said, elements: lists, films: [] };
}

const match = ({ caption, cosine, row }) =>
  h(
    "li",
    {},
    h("div", { class: "match-text" }, caption || "without a caption"),
    h("div", { class: "number" }, `cosine ${decimals(cosine)}, row ${row}`),
  );

const nameOf = ({ file, frame }) => `Image ${file + 1}${frame ? `, frame ${frame}` : ""}`;
const note = (text) => h("p", { class: "quiet" }, text);
