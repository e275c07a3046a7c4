// The page: choose a model, drop a case, ask, read the answer.
//
// What belongs to one kind of model stands in panels/KIND.js, which exports
//
//   fields(model) -> {element, read(), ready(files)}: what a request may say beside its files. read() gives the fields
//       as an object, ready whether it can be sent with so many files.
//   render(answer, model, asked) -> {finding, said, elements, films}: the answer to the fields that were asked.
//       finding: the word beside the decision; said: a sentence for who listens; films: [{file, frame, picture, map,
//       note, caption}], what to put on the light box (box.js), or none to leave it.
//
// model: what GET /v1/models says of it. A new kind needs a panel, and nothing else here.
import { answered, sentence, spoken } from "./answer.js";
import { Box } from "./box.js";
import { byId, h } from "./dom.js";
import { markdown } from "./markdown.js";
import { ask, askJson, forgetToken, hasToken } from "./server.js";

const KIND = /^[a-z][a-z0-9_]*$/;
const KINDS = ["PNG", "JPEG", "TIFF", "DICOM", "NIfTI"];
const AGAIN_MS = 3000;

const state = { models: [], model: null, panel: null, fields: null, asking: null };
const box = new Box(() => forgetAnswer());

async function start() {
  byId("go").disabled = true;
  try {
    state.models = await askJson("v1/models");
  } catch (error) {
    return show(error, true);
  }
  if (!state.models.length) {
    byId("model").replaceChildren(h("option", {}, "No model is ready yet"));
    return setTimeout(start, AGAIN_MS);
  }
  byId("problem").hidden = true;
  byId("model").replaceChildren(...state.models.map((model) => h("option", { value: model.model }, titleOf(model))));
  byId("model").disabled = false;
  await choose();
}

const titleOf = (model) => (model.version ? `${model.model}, version ${model.version}` : model.model);

async function choose() {
  const model = state.models.find((each) => each.model === byId("model").value);
  Object.assign(state, { model, panel: null, fields: null });
  byId("research").hidden = !model.research_only;
  byId("expects").textContent = expected(model.contract);
  byId("kinds").textContent = (model.contract.file_kinds ?? KINDS).join(", ");
  byId("card").open = false;
  byId("card-text").replaceChildren();
  byId("fields").replaceChildren();
  try {
    if (!KIND.test(model.kind)) throw new Error("not the name of a kind");
    const panel = await import(`./panels/${model.kind}.js`);
    if (state.model !== model) return;
    state.panel = panel;
    state.fields = panel.fields(model);
    byId("fields").replaceChildren(state.fields.element);
    forgetAnswer();
  } catch {
    show(new Error(`This page has no panel for a ${model.kind}: ask POST /v1/models/${model.model}:predict.`));
  }
}

/** What kind of images a contract expects, as far as it says. */
function expected(contract) {
  const stated = [contract.modality, contract.body_part].filter((text) => text && text !== "not stated");
  return stated.length ? `Expects ${stated.join(", ")}.` : "";
}

/** An answer never stands beside images, a model or fields that it was not given for. */
function forgetAnswer() {
  state.asking?.abort();
  byId("answer").replaceChildren();
  byId("said").textContent = "";
  clearProblem();
  box.showFiles();
  allow();
}

/** While it asks, the button keeps the focus that a disabled one would lose. */
function allow() {
  const ready = state.fields?.ready(box.files.length);
  byId("go").disabled = !ready;
  byId("go").setAttribute("aria-disabled", String(state.asking !== null));
  byId("stop").hidden = state.asking === null;
}

async function submit(event) {
  event.preventDefault();
  if (byId("go").disabled || state.asking) return;
  const { model, panel, fields } = state;
  const asking = (state.asking = new AbortController());
  clearProblem();
  allow();
  byId("answer").setAttribute("aria-busy", "true");
  byId("go").textContent = "Asking";
  try {
    const path = `v1/models/${encodeURIComponent(model.model)}:predict`;
    const asked = fields.read();
    const body = formOf(asked, box.files);
    const answer = await askJson(path, { method: "POST", body, signal: asking.signal });
    if (!asking.signal.aborted) present(answer, panel.render(answer, model, asked));
  } catch (error) {
    if (!asking.signal.aborted) show(error);
  } finally {
    state.asking = null;
    byId("answer").removeAttribute("aria-busy");
    byId("go").textContent = "Ask the model";
    allow();
  }
}

/** Files go without their names: those are the reader's own. */
function formOf(fields, files) {
  const form = new FormData();
  files.forEach((file, place) => form.append("file", file, `image-${place + 1}`));
  for (const [name, value] of Object.entries(fields)) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return form;
}

function present(answer, shown) {
  byId("answer").replaceChildren(...answered(answer, shown).filter(Boolean));
  byId("said").textContent = spoken(answer, shown);
  byId("research").hidden = !answer.research_only;
  if (shown.films.length) box.show(shown.films);
  byId("answer").scrollIntoView({ block: "nearest" });
}

/** What went wrong, in words, where it went wrong. */
function show(error, again = false) {
  const place = /^files\[(\d+)\]/.exec(error.field ?? "");
  const later = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const words = sentence(error.message.replace(/^files\[(\d+)\]: /, "")) + later;
  if (place) box.blame(Number(place[1]), words);
  const name = place && state.model ? `${box.name({ file: Number(place[1]) })}: ` : "";
  const retry = again && h("button", { type: "button", onclick: start }, "Try again");
  byId("problem").replaceChildren(name + words, retry || "");
  byId("problem").hidden = false;
  const field = CSS.escape((error.field ?? "").split(".")[0]);
  const input = byId("fields").querySelector(`[data-field="${field}"]`);
  if (!input) return;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", "problem");
  input.focus();
}

function clearProblem() {
  byId("problem").hidden = true;
  byId("problem").replaceChildren();
  for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

async function openCard() {
  const text = byId("card-text");
  if (!byId("card").open || text.childElementCount || !state.model) return;
  try {
    const response = await ask(`v1/models/${encodeURIComponent(state.model.model)}/card`);
    text.replaceChildren(...markdown(await response.text()));
  } catch (error) {
    text.replaceChildren(h("p", { class: "problem" }, sentence(error.message)));
  }
}

/** Light or dark, as the system is until somebody says otherwise; nothing of it is kept. */
function theme(isDark) {
  document.documentElement.classList.toggle("dark", isDark);
  document.documentElement.classList.toggle("light", !isDark);
  byId("dark").setAttribute("aria-pressed", String(isDark));
}

function largeText() {
  byId("large").setAttribute("aria-pressed", String(document.documentElement.classList.toggle("large")));
}

function stop() {
  state.asking?.abort();
  byId("go").focus();
}

byId("ask").addEventListener("submit", submit);
byId("model").addEventListener("change", choose);
byId("fields").addEventListener("input", forgetAnswer);
byId("card").addEventListener("toggle", openCard);
byId("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => event.key === "Escape" && state.asking && stop());
byId("forget").addEventListener("click", () => (forgetToken(), byId("model").focus()));
document.addEventListener("token", () => (byId("forget").hidden = !hasToken()));
byId("forget").hidden = !hasToken();
theme(matchMedia("(prefers-color-scheme: dark)").matches);
byId("dark").addEventListener("click", () => theme(!document.documentElement.classList.contains("dark")));
byId("large").addEventListener("click", largeText);
start();
