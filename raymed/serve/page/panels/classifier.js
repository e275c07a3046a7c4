// A classifier: a probability on its scale, and each image with its heat map.
import { decimals, h, newId, table } from "../dom.js";
import { scale } from "../scale.js";

const DELETION = `deletion: how much faster the probability falls when the highest parts of the map are taken away
first than at random. About 0: the map shows nothing that it rests on.`;
const METHODS = { gradcam: "Grad-CAM", ig: "Integrated gradients", occlusion: "Occlusion" };

export function fields(model) {
  const [id, test] = [newId("explain"), newId("deletion")];
  const choices = model.explain.map((name) => h("option", { value: name }, METHODS[name] ?? name));
  const select = h("select", { id, "data-field": "explain" }, choices, h("option", { value: "" }, "None"));
  const deletion = h("input", { id: test, type: "checkbox", "data-field": "deletion" });
  const element = h("div", {}, [
    h("div", { class: "field" }, h("label", { for: id }, "Heat map by"), select),
    h("div", { class: "check" }, deletion, h("label", { for: test }, "Test the map by deletion (slower)")),
  ]);
  const asked = () => ({ explain: select.value, explain_as: "array", deletion: deletion.checked });
  select.addEventListener("change", () => (deletion.disabled = !select.value));
  return { element, read: () => (select.value ? asked() : {}), ready: (files) => files > 0 };
}

export function render(answer, model) {
  const { probability, threshold, uncertain_band: band, label, images } = answer.result;
  const { positive } = model;
  return {
    finding: label,
    said: `Probability of ${positive} ${decimals(probability)}, threshold ${decimals(threshold)}.`,
    elements: [
      h("h3", {}, `Probability of ${positive}`),
      scale({ probability, threshold, band, label: positive }),
      details(images, positive),
    ],
    films: images.map((image) => filmOf(image, images.length > 1)),
  };
}

function filmOf({ explanation, ...image }, several) {
  return {
    file: image.file,
    frame: image.frame,
    picture: explanation && `data:image/png;base64,${explanation.image}`,
    map: explanation?.map ? explanation : null,
    note: explanation && `${explanation.note} What is marked speaks for ${explanation.target}.`,
    caption: h(
      "div",
      { class: "caption" },
      several && h("span", { class: "number" }, `${decimals(image.probability)} ${image.label}`),
      flags(image).map((flag) => h("span", { class: "flag" }, flag)),
      explanation && h("span", { class: "shape" }, `as the network receives it, ${explanation.shape.join(" x ")}`),
    ),
  };
}

const flags = ({ foreign, uncertain }) =>
  [foreign && "unlike the training images", uncertain && "uncertain"].filter(Boolean);

/** What the network said of each image, how far each is from those of training, and what its map is worth. */
function details(images, positive) {
  const distances = Object.keys(images[0].distances ?? {});
  const deleted = images.some((image) => image.explanation?.deletion);
  const head = ["Image", positive, ...distances, ...(deleted ? ["deletion"] : []), ""];
  const rows = images.map((image) => [
    `${image.file + 1}${image.frame ? `, frame ${image.frame}` : ""}`,
    decimals(image.probability),
    ...distances.map((name) => decimals(image.distances[name], 2)),
    ...(deleted ? [decimals(image.explanation?.deletion?.difference)] : []),
    flags(image).join(", "),
  ]);
  const names = distances.join(", ");
  const notes = [names && `${names}: distances from the training images.`, deleted && DELETION];
  return h(
    "details",
    {},
    h("summary", {}, images.length > 1 ? `Each of the ${images.length} images` : "The image in numbers"),
    table(head, rows, "Images"),
    notes.filter(Boolean).map((note) => h("p", { class: "quiet" }, note)),
  );
}
