// Elements of the page. Texts become text nodes: nothing here or elsewhere writes HTML.

/** Return the element of the page with this id. */
export function find(id) {
  return document.getElementById(id);
}

/**
 * Return a new element with properties and children.
 * Properties are those of the DOM, such as className or onclick; names with a hyphen or "role" are
 * attributes. Children are elements or texts; null and undefined are left out.
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Show a text in an element, or hide it if the text is empty. */
export function showText(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

/** Return a number with a plural noun, such as "1 document" or "1,200 documents". */
export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** Return a button with a text and what a click does. */
export function makeButton(text, onclick, properties = {}) {
  return make("button", { type: "button", onclick, ...properties }, text);
}
