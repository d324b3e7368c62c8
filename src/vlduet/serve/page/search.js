// Search: the query, the results in a grid, and pages of them.

import { isStopped, sendForJson } from "./api.js";
import { formatScore, openDetails } from "./details.js";
import { count, find, make, makeButton, showText } from "./dom.js";
import { conditions, setUpFilters } from "./filters.js";
import { fetchIndexImage, imagePart, makeAttachment, makeIndexImage, readImageFile } from "./images.js";

const PAGE_SIZE = 24;
const THUMBNAIL_SIZE = 320;
const MAX_OFFSET = 100_000;

// What is searched for: an attachment, or a document whose neighbours are wanted; or neither.
let attached = null;
let like = null;
let offset = 0;
let running = null;

/** Prepare the search of an index, GET /v1/index. */
export function setUpSearch(index) {
  setUpFilters(index.fields, () => { if (hasQuery()) search(0); });
  find("search-form").onsubmit = (event) => {
    event.preventDefault();
    if (find("query-text").value.trim()) setLike(null);
    search(0);
  };
  find("query-file").onchange = (event) => {
    searchWithFiles([...event.target.files]);
    event.target.value = "";
  };
  find("search-stop").onclick = stopSearch;
  find("previous-page").onclick = () => search(offset - PAGE_SIZE);
  find("next-page").onclick = () => search(offset + PAGE_SIZE);
}

/** Search with the first of some image files, and with the text if there is one. */
export async function searchWithFiles(files) {
  if (files.length === 0) return;
  try {
    setAttached(await readImageFile(files[0]));
  } catch (error) {
    showText(find("search-error"), error.message);
    return;
  }
  await search(0);
}

/** Search with the image of a document of the index, to which a text can be added. */
export async function searchWithDocument(hit) {
  try {
    setAttached(await fetchIndexImage(hit.image, hit.id));
  } catch (error) {
    showText(find("search-error"), error.message);
    return;
  }
  find("query-text").focus();
  await search(0);
}

/** Search for the documents that are like a document of the index. */
export async function searchLike(hit) {
  setLike(hit);
  find("query-text").value = "";
  find("query-text").focus();
  await search(0);
}

/** Stop the search that runs; return whether there was one. */
export function stopSearch() {
  const wasRunning = running !== null;
  running?.abort();
  return wasRunning;
}

function setAttached(attachment) {
  [attached, like] = [attachment, null];
  showAttachments();
}

function setLike(hit) {
  if (hit === null && like === null) return;
  [attached, like] = [null, hit];
  showAttachments();
}

function showAttachments() {
  const shown = [];
  const focusText = () => find("query-text").focus();
  if (attached) shown.push(makeAttachment(attached, () => { setAttached(null); focusText(); }));
  if (like) {
    const remove = () => { setLike(null); focusText(); };
    const image = like.image ? makeIndexImage(like.image, 64) : null;
    const text = make("span", { className: "like-text" }, `like ${like.id}`);
    const button = makeButton("×", remove, { className: "remove", "aria-label": "Remove the document" });
    shown.push(make("span", { className: "attachment wide" }, image, text, button));
  }
  find("query-image").replaceChildren(...shown);
}

function hasQuery() {
  return Boolean(attached || like || find("query-text").value.trim());
}

function makeBody(first) {
  // One more than a page shows tells whether there is another page.
  const body = { k: PAGE_SIZE + 1, offset: first, where: conditions() };
  if (like) return { ...body, like: like.id };
  const text = find("query-text").value.trim();
  const parts = attached ? [imagePart(attached)] : [];
  if (text) parts.push({ type: "text", text });
  return { ...body, query: parts };
}

async function search(first) {
  if (!hasQuery()) {
    find("search-status").textContent = "Type a text, or add an image.";
    find("query-text").focus();
    return;
  }
  running?.abort();
  const controller = new AbortController();
  running = controller;
  showText(find("search-error"), "");
  find("search-status").textContent = "Searching …";
  find("search-stop").hidden = false;
  find("results").setAttribute("aria-busy", "true");
  let hits = null;
  let message = "";
  try {
    const body = makeBody(Math.min(Math.max(first, 0), MAX_OFFSET));
    hits = (await sendForJson("v1/search", { body, signal: controller.signal })).data;
    offset = body.offset;
  } catch (error) {
    message = isStopped(error) ? "" : error.message;
  }
  if (running !== controller) return; // a newer search has begun
  running = null;
  find("search-stop").hidden = true;
  find("results").removeAttribute("aria-busy");
  showText(find("search-error"), message);
  if (hits) showHits(hits);
  else find("search-status").textContent = message ? "The search failed." : "Stopped.";
}

function showHits(hits) {
  const page = hits.slice(0, PAGE_SIZE);
  const turnedPage = find("result-pages").contains(document.activeElement);
  find("results").replaceChildren(...page.map(makeCard));
  const hasNext = hits.length > PAGE_SIZE;
  let status = `Results ${offset + 1} to ${offset + page.length}`;
  if (offset === 0 && !hasNext) status = page.length ? count(page.length, "result") : "Nothing found.";
  find("search-status").textContent = status;
  find("score-help").hidden = page.length === 0;
  find("result-pages").hidden = offset === 0 && !hasNext;
  find("previous-page").disabled = offset === 0;
  find("next-page").disabled = !hasNext || offset + PAGE_SIZE > MAX_OFFSET;
  find("page-number").textContent = `Page ${offset / PAGE_SIZE + 1}`;
  if (turnedPage) find("results").querySelector("button")?.focus();
}

function makeCard(hit) {
  const picture = hit.image ? makeIndexImage(hit.image, THUMBNAIL_SIZE) : null;
  const className = hit.image ? "card-text" : "card-text alone";
  const text = make("span", { className }, hit.text || hit.id);
  const open = makeButton("", () => openDetails(hit), { className: "card-open", title: hit.id });
  open.append(...[picture, text].filter(Boolean));
  const label = `More like ${hit.id}`;
  const more = makeButton("More like this", () => searchLike(hit), {
    className: "quiet", "aria-label": label,
  });
  const score = make("span", { className: "score", title: "score, p" }, formatScore(hit));
  return make("li", { className: "card" }, open, make("div", { className: "card-foot" }, score, more));
}
