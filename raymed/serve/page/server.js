// Asking the server: the token, and what goes wrong, in words.
import { byId } from "./dom.js";

const KEY = "raymed-token";

/** An RFC 9457 problem, or a server that cannot be reached. field: of the request, that it is about, or "". */
export class Problem extends Error {
  constructor(status, detail, field = "", retryAfter = 0) {
    super(detail);
    Object.assign(this, { status, field, retryAfter });
  }
}

/** What the server answers; asks for a token where it wants one. Throws Problem, or AbortError when it is stopped. */
export async function ask(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem(KEY);
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const response = await reach(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (problem.status !== 401) throw problem;
    if (token && sessionStorage.getItem(KEY) === token) forgetToken();
    await askForToken(token ? problem.message : "");
  }
}

/** The same, as JSON. */
export const askJson = async (path, options) => (await ask(path, options)).json();

/** Whether there is a token. */
export const hasToken = () => sessionStorage.getItem(KEY) !== null;

/** Forget it. */
export function forgetToken() {
  sessionStorage.removeItem(KEY);
  document.dispatchEvent(new Event("token"));
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The server cannot be reached.");
  }
}

async function problemOf(response) {
  const said = await response.json().catch(() => ({}));
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  return new Problem(response.status, said.detail || `The server answered ${response.status}.`, said.field, retryAfter);
}

let asking = null;

/** Opens the dialog, once for all who wait. Throws Problem where nobody gives a token. */
function askForToken(why) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("token");
    const text = byId("token-text");
    byId("token-why").textContent = why && `The last one was refused: ${why}.`;
    text.value = "";
    const closed = () => {
      asking = null;
      const given = dialog.returnValue === "use" ? text.value.trim() : "";
      text.value = "";
      if (!given) return reject(new Problem(401, "This server answers only those who have a token.", "token"));
      sessionStorage.setItem(KEY, given);
      document.dispatchEvent(new Event("token"));
      resolve();
    };
    dialog.returnValue = "";
    dialog.addEventListener("close", closed, { once: true });
    dialog.showModal();
  });
  return asking;
}
