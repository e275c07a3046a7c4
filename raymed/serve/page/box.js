// The light box: the images of the case, before and after they were answered.
import { byId, h } from "./dom.js";
import { film } from "./film.js";

const UNDRAWN = "No preview: this browser cannot draw this kind of file.";

/** Files that were dropped or chosen, and the films that show them. changed: called whenever the files are others. */
export class Box {
  constructor(changed) {
    this.files = [];
    this.urls = new Map();
    this.changed = changed;
    this.input = byId("files");
    this.input.addEventListener("change", () => (this.add(this.input.files), (this.input.value = "")));
    for (const id of ["drop", "more"]) byId(id).addEventListener("click", () => this.input.click());
    byId("clear").addEventListener("click", () => (this.set([]), byId("drop").focus()));
    byId("opacity").addEventListener("input", () => this.fade());
    this.takeDrops();
    this.fade();
  }

  /** Files that are dropped anywhere on the page are of the case. */
  takeDrops() {
    const over = (is) => (event) => {
      event.preventDefault();
      byId("box").classList.toggle("over", is);
      if (event.type === "drop") this.add(event.dataTransfer.files);
    };
    document.addEventListener("dragover", over(true));
    document.addEventListener("dragleave", over(false));
    document.addEventListener("drop", over(false));
  }

  add(files) {
    if (files.length) this.set([...this.files, ...files]);
  }

  set(files) {
    for (const file of this.files) if (!files.includes(file)) this.forget(file);
    this.files = files;
    this.changed();
  }

  forget(file) {
    URL.revokeObjectURL(this.urls.get(file));
    this.urls.delete(file);
  }

  picture(file) {
    if (!this.urls.has(file)) this.urls.set(file, URL.createObjectURL(file));
    return this.urls.get(file);
  }

  /** The files as they are, without an answer. */
  showFiles() {
    this.show(this.files.map((_, place) => ({ file: place })));
  }

  /** films: [{file: place among the files, frame, picture, map, note, caption}] */
  show(films) {
    const several = this.files.length > 0;
    byId("drop").hidden = several;
    byId("box-tools").hidden = !several;
    const note = films.find((each) => each.map)?.note;
    byId("layers").hidden = !films.some((each) => each.map);
    if (note) byId("layers-note").textContent = note;
    const shown = films.map((each) =>
      film({ ...each, name: this.name(each), picture: this.shown(each), missing: UNDRAWN, remove: this.removal(each) }),
    );
    byId("films").replaceChildren(...shown);
    byId("films").classList.toggle("one", shown.length === 1);
    this.fade();
  }

  /** What takes the file off; none for one of its frames. */
  removal({ file, frame }) {
    if (frame) return null;
    const gone = this.files[file];
    return () => {
      this.set(this.files.filter((each) => each !== gone));
      byId(this.files.length ? "more" : "drop").focus();
    };
  }

  shown({ picture, file, frame }) {
    if (picture) return picture;
    return frame || !this.files[file] ? null : this.picture(this.files[file]);
  }

  name({ file, frame }) {
    const name = this.files[file]?.name || `Image ${file + 1}`;
    return frame ? `${name}, frame ${frame}` : name;
  }

  /** Say at a film what is wrong with it. */
  blame(place, words) {
    const wrong = byId("films").children[place];
    wrong?.classList.add("wrong");
    wrong?.querySelector("figcaption").append(h("p", { class: "problem" }, words));
  }

  fade() {
    const share = byId("opacity").value;
    byId("opacity-value").textContent = `${share} %`;
    for (const map of document.querySelectorAll(".map")) map.style.opacity = share / 100;
  }
}
