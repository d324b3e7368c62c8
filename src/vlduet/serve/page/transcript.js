// Elements of a conversation: messages of the user, and answers as they arrive.

import { openDetails, formatScore } from "./details.js";
import { count, find, make, makeButton } from "./dom.js";
import { makeIndexImage } from "./images.js";

const IMAGE_SIZE = 320;
const NEAR_END_PIXELS = 300;

/** Add a message of the user to the conversation; return its element. */
export function addQuestion(text, attachments) {
  const images = attachments.map(({ name, url }) => make("img", { src: url, alt: name }));
  const row = images.length ? make("div", { className: "question-images" }, ...images) : null;
  const question = make("article", { className: "question", "aria-label": "You" },
    row, make("p", {}, text));
  find("transcript").append(question);
  scrollToEnd();
  return question;
}

/**
 * An answer in the conversation. Texts lie on blue and images from the index on pink, in the order
 * in which they arrive; an image stands beside the text before it.
 */
export class AnswerView {
  constructor() {
    this.parts = []; // {text} or {hit, url}, in order
    this.textNode = null;
    this.row = null;
    this.flow = make("div", { className: "flow" });
    this.element = make("article", { className: "answer", "aria-label": "Answer" }, this.flow);
    this.element.setAttribute("aria-busy", "true");
    followEnd(() => find("transcript").append(this.element));
  }

  /** Add a piece of text. */
  addText(text) {
    followEnd(() => {
      if (this.textNode === null) {
        // A blank between two images is not worth a box.
        text = text.trimStart();
        if (!text) return;
        this.textNode = document.createTextNode("");
        this.row = make("div", { className: "slice" }, make("p", { className: "generated" }, this.textNode));
        this.flow.append(this.row);
        this.parts.push({ text: "" });
      }
      this.textNode.appendData(text);
      this.parts.at(-1).text += text;
    });
  }

  /** Add a retrieved image, a part of an answer with its document. */
  addImage(part) {
    const hit = { ...part.hit, image: part.hit?.image ?? part.image_url.url };
    followEnd(() => {
      if (this.textNode === null) {
        this.row = make("div", { className: "slice" });
        this.flow.append(this.row);
      }
      this.textNode = null;
      this.parts.push({ hit, url: part.image_url.url });
      this.row.append(makeRetrieved(hit));
    });
  }

  /** Show the documents that the prompt quotes below the answer. */
  addSources(hits) {
    const label = `${count(hits.length, "document")} in the prompt`;
    const list = make("ul", {}, ...hits.map((hit) => make("li", {}, makeRetrieved(hit))));
    const sources = make("div", { className: "sources" }, make("p", {}, label), list);
    followEnd(() => this.element.append(sources));
  }

  /** Mark the answer as complete, with a note such as "Stopped." */
  end(note = "") {
    this.element.removeAttribute("aria-busy");
    if (note) followEnd(() => this.element.append(make("p", { className: "note" }, note)));
  }

  /** Return the answer as the content of a message of a later request. */
  content() {
    const parts = this.parts.map(({ text, url }) => (url === undefined
      ? { type: "text", text } : { type: "image_url", image_url: { url } }));
    if (parts.some((part) => part.type === "image_url")) return parts;
    return parts.map((part) => part.text).join("");
  }
}

/** Change the conversation; if its end was in view, scroll so that it still is. */
function followEnd(change) {
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  const isNearEnd = scrollHeight - clientHeight - scrollTop < NEAR_END_PIXELS;
  change();
  if (isNearEnd) scrollToEnd();
}

function scrollToEnd() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

/** Return a button on pink that shows a document of the index and opens it. */
function makeRetrieved(hit) {
  const picture = hit.image ? makeIndexImage(hit.image, IMAGE_SIZE) : null;
  if (picture) {
    picture.loading = "eager";
    // The image has no height before.
    picture.onload = () => followEnd(() => {});
  }
  const caption = make("span", { className: "caption" }, hit.text || hit.id);
  const score = make("span", { className: "score" }, hit.score === undefined ? "" : formatScore(hit));
  const button = makeButton("", () => openDetails(hit), {
    className: "retrieved", "aria-label": `Open the source ${hit.id}: ${hit.text ?? ""}`,
  });
  button.append(...[picture, caption, score].filter(Boolean));
  return button;
}
