// Start of the page: asks the server what it offers, and shows these parts.

import { forgetKey, isStopped, sendForJson, setKeyPrompt, storedKey } from "./api.js";
import { attachDocument, attachFiles, setUpChat, stopChat } from "./chat.js";
import { setUpDetails } from "./details.js";
import { count, find, showText } from "./dom.js";
import { imageFiles } from "./images.js";
import { searchLike, searchWithDocument, searchWithFiles, setUpSearch, stopSearch } from "./search.js";

const PARTS = ["search", "chat"];

let offered = [];

/** Ask the user for an API key in a dialog; return it, or null if the user cancels. */
function askForKey(reason) {
  const dialog = find("key-dialog");
  showText(find("key-error"), reason);
  find("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    let key = null;
    find("key-form").onsubmit = (event) => {
      event.preventDefault();
      key = find("key").value.trim() || null;
      dialog.close();
    };
    find("cancel-key").onclick = () => dialog.close();
    dialog.onclose = () => resolve(key);
  });
}

/** Show one of the offered parts. */
function showPart(name, { focusTab = false } = {}) {
  for (const part of PARTS) {
    const tab = find(`${part}-tab`);
    const isShown = part === name;
    tab.setAttribute("aria-selected", String(isShown));
    tab.tabIndex = isShown ? 0 : -1;
    find(part).hidden = !isShown;
    if (isShown && focusTab) tab.focus();
  }
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
}

function isShown(name) {
  return !find(name).hidden;
}

function setUpTabs() {
  find("tabs").hidden = offered.length < 2;
  for (const name of offered) find(`${name}-tab`).onclick = () => showPart(name);
  find("tabs").onkeydown = (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    event.preventDefault();
    showPart(isShown("search") ? "chat" : "search", { focusTab: true });
  };
  window.onhashchange = () => {
    const name = location.hash.slice(1);
    if (offered.includes(name)) showPart(name);
  };
  const wanted = location.hash.slice(1);
  showPart(offered.includes(wanted) ? wanted : offered[0]);
}

/** Give image files that were dropped or pasted to the part that is shown. */
function useFiles(files) {
  if (isShown("search")) searchWithFiles(files);
  else attachFiles(files);
}

function setUpDropsAndPastes() {
  const hint = find("drop-hint");
  const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.ondragover = (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    hint.hidden = false;
  };
  document.ondragleave = (event) => { if (event.relatedTarget === null) hint.hidden = true; };
  document.ondrop = (event) => {
    hint.hidden = true;
    if (!carriesFiles(event)) return;
    event.preventDefault(); // otherwise the browser would leave the page and open the file
    useFiles(imageFiles(event.dataTransfer));
  };
  document.onpaste = (event) => {
    const files = imageFiles(event.clipboardData);
    if (files.length === 0) return;
    event.preventDefault();
    useFiles(files);
  };
}

function setUpEscape() {
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (isShown("search") ? stopSearch() : stopChat()) event.preventDefault();
  });
}

function setUpForgetting() {
  find("forget-key").hidden = storedKey() === null;
  find("forget-key").onclick = () => {
    forgetKey();
    location.reload();
  };
}

async function start() {
  setKeyPrompt(askForKey);
  const [model] = (await sendForJson("v1/models")).data;
  const index = model.capabilities.search ? await sendForJson("v1/index") : null;
  const facts = [model.id, ...(index ? [count(index.documents, "document")] : [])];
  showText(find("served"), facts.join(" · "));
  document.title = `${model.id} · VLDuet`;
  setUpForgetting();
  offered = PARTS.filter((part) => model.capabilities[part]);
  if (offered.length === 0) {
    showText(find("page-status"), "This model embeds and does not chat, and the server has no index to search. Start it with --index INDEX.");
    return;
  }
  showText(find("page-status"), "");
  if (index) setUpSearch(index);
  if (model.capabilities.chat) setUpChat(index !== null);
  setUpDetails({
    moreLikeThis: (hit) => { showPart("search"); searchLike(hit); },
    useAsQuery: (hit) => { showPart("search"); searchWithDocument(hit); },
    askAbout: model.capabilities.chat && ((hit) => { showPart("chat"); attachDocument(hit); }),
  });
  setUpTabs();
  setUpDropsAndPastes();
  setUpEscape();
}

start().catch((error) => {
  if (!isStopped(error)) showText(find("page-status"), error.message);
});
