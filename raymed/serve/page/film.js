// An image on the light box, and the heat map over it.
import { h } from "./dom.js";

// From nothing over violet and orange to pale yellow: lightness rises with the value, also for the colour-blind.
const STOPS = [
  [0, 60, 15, 90, 0],
  [0.25, 110, 30, 110, 90],
  [0.5, 200, 65, 80, 190],
  [0.75, 250, 140, 40, 235],
  [1, 255, 240, 150, 255],
];

/** A figure. picture: URL of an image, or null; map: {shape: [H, W], map: base64 of H x W bytes} or null. */
export function film({ name, picture, missing, map, caption, remove }) {
  const plate = h("div", { class: "plate" });
  const absent = () => plate.prepend(h("p", { class: "absent" }, missing || "No preview"));
  if (picture) {
    const image = h("img", { src: picture, alt: name, draggable: "false" });
    image.addEventListener("error", () => (image.remove(), absent()), { once: true });
    plate.append(image);
  } else absent();
  if (map) plate.append(heatMap(map, name));
  const figure = h("figure", { class: "film" }, plate);
  const tools = h("span", { class: "film-tools" }, enlarging(figure, name), remove && removing(remove, name));
  figure.append(h("figcaption", {}, h("div", { class: "film-name" }, name, tools), caption));
  return figure;
}

function enlarging(figure, name) {
  const toggle = () => button.setAttribute("aria-pressed", String(figure.classList.toggle("large")));
  const label = { "aria-label": `Enlarge ${name}`, "aria-pressed": "false" };
  const button = h("button", { type: "button", class: "enlarge", ...label, onclick: toggle }, "Enlarge");
  return button;
}

const removing = (remove, name) =>
  h("button", { type: "button", "aria-label": `Remove ${name}`, onclick: remove }, "Remove");

/** A canvas of the map's own size; the style sheet lays it over the image. */
function heatMap({ shape, map }, name) {
  const [height, width] = shape;
  const canvas = h("canvas", { class: "map", width, height, role: "img", "aria-label": `Heat map of ${name}` });
  const values = Uint8Array.from(atob(map), (letter) => letter.charCodeAt(0));
  const pixels = new ImageData(width, height);
  for (let i = 0; i < values.length; i += 1) pixels.data.set(COLOURS[values[i]], 4 * i);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function colourOf(value) {
  const next = Math.max(1, STOPS.findIndex(([at]) => at >= value));
  const [[from, ...low], [to, ...high]] = [STOPS[next - 1], STOPS[next]];
  const share = (value - from) / (to - from);
  return low.map((start, i) => Math.round(start + share * (high[i] - start)));
}

const COLOURS = Array.from({ length: 256 }, (_, i) => colourOf(i / 255));
