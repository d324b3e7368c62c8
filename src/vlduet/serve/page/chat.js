// Conversation with the model, with images, and with retrieval before or during an answer.

import { isStopped, streamChat } from "./api.js";
import { find, showText } from "./dom.js";
import { conditions } from "./filters.js";
import { fetchIndexImage, imagePart, makeAttachment, readImageFile } from "./images.js";
import { addQuestion, AnswerView } from "./transcript.js";

const MAX_IMAGES = 8;

let messages = [];
let attachments = [];
let running = null;
let retrieves = false;

/** Prepare the conversation. `hasIndex`: whether answers may use documents of an index. */
export function setUpChat(hasIndex) {
  retrieves = hasIndex;
  find("retrieval-choice").hidden = !hasIndex;
  find("retrieval-mode").onchange = showOptions;
  showOptions();
  find("send").onclick = () => (running ? stopChat() : ask());
  find("new-chat").onclick = startAnew;
  find("message").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) ask();
  };
  find("chat-file").onchange = (event) => {
    attachFiles([...event.target.files]);
    event.target.value = "";
  };
}

/** Add image files to the next message. */
export async function attachFiles(files) {
  for (const file of files) {
    try {
      attach(await readImageFile(file));
    } catch (error) {
      showText(find("chat-error"), error.message);
    }
  }
}

/** Add the image of a document of the index to the next message. */
export async function attachDocument(hit) {
  try {
    attach(await fetchIndexImage(hit.image, hit.id));
  } catch (error) {
    showText(find("chat-error"), error.message);
  }
  find("message").focus();
}

/** Stop the answer that is being written; return whether there was one. */
export function stopChat() {
  const wasRunning = running !== null;
  running?.abort();
  return wasRunning;
}

function attach(attachment) {
  if (attachments.length === MAX_IMAGES) throw new Error(`A message has ${MAX_IMAGES} images at most.`);
  attachments.push(attachment);
  showText(find("chat-error"), "");
  showAttachments();
}

function showAttachments() {
  find("chat-images").replaceChildren(...attachments.map((attachment) => (
    makeAttachment(attachment, () => {
      attachments = attachments.filter((other) => other !== attachment);
      showAttachments();
      find("message").focus();
    })
  )));
}

function mode() {
  return retrieves ? find("retrieval-mode").value : "off";
}

function showOptions() {
  const chosen = mode();
  const shown = { any: true, retrieval: chosen !== "off", [chosen]: true };
  for (const label of find("chat-options").querySelectorAll("[data-mode]")) {
    label.hidden = !shown[label.dataset.mode];
  }
  find("use-filters-choice").hidden ||= find("filters").hidden;
}

/** Return the number in an input; undefined if it is empty. */
function number(id) {
  const input = find(id);
  if (!input.checkValidity()) {
    const label = input.labels[0].firstChild.textContent.trim();
    throw new Error(`${label}: ${input.validationMessage}`);
  }
  return input.value === "" ? undefined : Number(input.value);
}

function retrievalOptions() {
  const chosen = mode();
  if (chosen === "off") return undefined;
  const where = find("use-filters").checked ? conditions() : undefined;
  if (chosen === "context") {
    return { mode: chosen, scope: find("scope").value, where, k: number("references") };
  }
  const common = { mode: chosen, where, feed_back: find("feed-back").checked };
  const template = find("template").value.trim();
  // Every place of a template gets an image, so that the other two options have no meaning.
  if (template) return { ...common, template };
  return { ...common, threshold: number("threshold"), max_images: number("max-images") };
}

async function ask() {
  const text = find("message").value.trim();
  showText(find("chat-error"), "");
  if (!text && attachments.length === 0) return;
  let options;
  try {
    options = {
      max_tokens: number("max-tokens"),
      temperature: number("temperature"),
      retrieval: retrievalOptions(),
    };
  } catch (error) {
    find("chat-options").open = true;
    showText(find("chat-error"), error.message);
    return;
  }
  const parts = attachments.map(imagePart);
  if (text) parts.push({ type: "text", text });
  const question = { role: "user", content: attachments.length ? parts : text };
  const asked = { text, attachments, question, element: addQuestion(text, attachments) };
  find("message").value = "";
  attachments = [];
  showAttachments();
  await readAnswer(asked, { ...options, messages: [...messages, question] });
}

async function readAnswer(asked, body) {
  const controller = new AbortController();
  running = controller;
  showBusy(true);
  const view = new AnswerView();
  let note = "";
  let message = "";
  try {
    for await (const chunk of streamChat(body, controller.signal)) {
      const delta = chunk.choices[0]?.delta ?? {};
      if (delta.content) view.addText(delta.content);
      for (const part of delta.parts ?? []) view.addImage(part);
      if (chunk.sources?.length && body.retrieval?.mode === "context") view.addSources(chunk.sources);
      if (chunk.choices[0]?.finish_reason === "length") note = "The answer ends here because it reached the longest length.";
    }
    if (view.parts.length === 0) note = "The answer is empty.";
  } catch (error) {
    if (isStopped(error)) note = "Stopped.";
    else message = error.message;
  }
  if (running !== controller) return; // a new conversation has begun
  running = null;
  showBusy(false);
  find("chat-status").textContent = message ? "" : note || "The answer is complete.";
  if (message && view.parts.length === 0) {
    takeBack(asked, view);
  } else {
    view.end(message ? "The answer is incomplete." : note);
    messages.push(asked.question, { role: "assistant", content: view.content() });
  }
  showText(find("chat-error"), message);
  find("new-chat").hidden = messages.length === 0;
}

/** Remove a question without an answer, and put it back into the input to be changed. */
function takeBack(asked, view) {
  view.element.remove();
  asked.element.remove();
  if (!find("message").value) find("message").value = asked.text;
  if (attachments.length === 0) attachments = asked.attachments;
  showAttachments();
}

function showBusy(isBusy) {
  find("send").textContent = isBusy ? "Stop" : "Send";
  find("chat-hint").hidden = true;
  find("transcript").toggleAttribute("data-busy", isBusy);
  if (isBusy) find("chat-status").textContent = "The answer is being written.";
}

function startAnew() {
  running?.abort();
  running = null;
  messages = [];
  showBusy(false);
  find("transcript").replaceChildren();
  showText(find("chat-error"), "");
  find("chat-hint").hidden = false;
  find("new-chat").hidden = true;
  find("message").focus();
}
