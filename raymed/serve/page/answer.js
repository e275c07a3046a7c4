// What every answer says, whatever the kind of its model: the decision, its reasons, and where it comes from.
import { h } from "./dom.js";

const WORDS = { positive: "Positive", negative: "Negative", abstain: "Abstains" };

/** Elements. shown: what the panel of the model's kind made of the answer (see app.js). */
export function answered(answer, shown) {
  return [decision(answer, shown.finding), ...shown.elements, origin(answer)];
}

/** The same in one sentence, for who listens. */
export function spoken(answer, shown) {
  const finding = answer.decision === "abstain" ? "" : shown.finding;
  const decided = answer.decision && [WORDS[answer.decision], finding].filter(Boolean).join(": ");
  return [decided, ...answer.reasons, shown.said].filter(Boolean).map(sentence).join(" ");
}

function decision({ decision, reasons }, finding) {
  const abstains = decision === "abstain";
  const listed = reasons.map((reason) => h("li", {}, sentence(reason)));
  const why = h("ul", { class: abstains ? "reasons" : "reasons plain" }, listed);
  if (!decision) return reasons.length > 0 && why;
  return h(
    "div",
    { class: `decision ${decision}` },
    h("h2", {}, WORDS[decision], finding && !abstains && h("span", { class: "finding" }, finding)),
    abstains && h("p", { class: "referred" }, "The model gives no decision. A person reads this case."),
    why,
  );
}

/** "files must ..." -> "Files must ....": how the server's sentences stand on a page. */
export const sentence = (text) => text && text[0].toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");

function origin(answer) {
  const rows = {
    Model: answer.version ? `${answer.model}, version ${answer.version}` : answer.model,
    Run: answer.run_id,
    Bundle: answer.bundle,
    Preprocessing: answer.preprocessing,
  };
  const research = answer.research_only;
  const pairs = Object.entries(rows).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
  return h(
    "div",
    { class: "origin" },
    h("p", {}, h("strong", {}, "Intended use. "), sentence(answer.intended_use), research && " Research use only."),
    h("details", {}, h("summary", {}, "Where this answer comes from"), h("dl", {}, pairs)),
  );
}
