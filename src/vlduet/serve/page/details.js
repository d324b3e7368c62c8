// The dialog that shows one document of the index.

import { find, make } from "./dom.js";
import { makeIndexImage } from "./images.js";

const FULL_SIZE = 1024;

let actions = {};
let current = null;

/**
 * Prepare the dialog. `handlers` has functions that get a document as the server describes it:
 * moreLikeThis, useAsQuery, and askAbout; one that is missing has no button.
 */
export function setUpDetails(handlers) {
  actions = {
    "more-like-this": handlers.moreLikeThis,
    "use-as-query": handlers.useAsQuery,
    "ask-about": handlers.askAbout,
  };
  const dialog = find("document-dialog");
  find("close-document").onclick = () => dialog.close();
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  for (const [id, action] of Object.entries(actions)) {
    find(id).onclick = () => { dialog.close(); action(current); };
  }
}

/** Show a document in the dialog. */
export function openDetails(hit) {
  current = hit;
  find("document-title").textContent = hit.id;
  const picture = hit.image ? makeIndexImage(hit.image, FULL_SIZE, hit.text || hit.id) : null;
  const text = hit.text ? make("p", { className: "document-text" }, hit.text) : null;
  find("document-body").replaceChildren(...[picture, text, makeFacts(hit)].filter(Boolean));
  for (const [id, action] of Object.entries(actions)) {
    find(id).hidden = !action || (id !== "more-like-this" && !hit.image);
  }
  find("document-dialog").showModal();
}

function makeFacts(hit) {
  const facts = [];
  if (hit.score !== undefined) facts.push(["score", formatScore(hit)]);
  for (const [name, value] of Object.entries(hit.metadata ?? {})) {
    facts.push([name, typeof value === "string" ? value : JSON.stringify(value)]);
  }
  const rows = facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  return make("dl", {}, ...rows);
}

/** Return the score of a document, and its p if it is known, as a short text. */
export function formatScore({ score, p }) {
  const share = p === undefined || p === null ? "" : `, p ${Number(p.toPrecision(2))}`;
  return `${score.toFixed(3)}${share}`;
}
