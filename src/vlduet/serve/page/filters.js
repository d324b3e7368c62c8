// Filters on metadata: controls for the fields of the index, and the conditions that they stand for.
//
// Conditions are texts as in `vlduet search --where`, such as "category" in "ships","lakes".

import { find, make, makeButton } from "./dom.js";

const MAX_NUMBERS_TO_CHOOSE = 12;

// One for each field: its name, conditions(), and clear().
let controls = [];
let changed = () => {};

/** Make the controls for the fields of GET /v1/index. `onChange` is called after each change. */
export function setUpFilters(fields, onChange) {
  changed = onChange;
  controls = fields.map(makeControl);
  find("filter-fields").replaceChildren(...controls.map((control) => control.element));
  find("filters").hidden = fields.length === 0;
  find("filter-fields").addEventListener("change", update);
}

/** Return the conditions that are set, as the value of `where`; undefined if there are none. */
export function conditions() {
  const all = controls.flatMap((control) => control.conditions().map(({ text }) => text));
  return all.length === 0 ? undefined : all;
}

function update() {
  const chips = controls.flatMap((control) => control.conditions().map((condition) => {
    const label = `Remove the filter ${condition.label}`;
    const remove = () => { condition.clear(); update(); };
    const button = makeButton("×", remove, { className: "remove", "aria-label": label });
    return make("span", { className: "chip" }, condition.label, button);
  }));
  find("filter-chips").replaceChildren(...chips);
  changed();
}

function makeControl(field) {
  const isList = field.type.endsWith(" list");
  const isRange = field.type === "date" || field.type === "number";
  const hasManyNumbers = field.type === "number" && field.values?.length > MAX_NUMBERS_TO_CHOOSE;
  if (field.values && field.type !== "date" && !hasManyNumbers) return makeChoice(field, isList);
  return isRange ? makeRange(field) : makeInput(field, isList);
}

function makeChoice(field, isList) {
  const boxes = field.values.map((value) => {
    const box = make("input", { type: "checkbox" });
    return { box, value, label: make("label", {}, box, ` ${spell(value)}`) };
  });
  const checked = () => boxes.filter(({ box }) => box.checked);
  const legend = make("legend", {}, isList ? `${field.name} contains all of` : field.name);
  const list = make("div", { className: "choices" }, ...boxes.map(({ label }) => label));
  const element = make("fieldset", {}, legend, list);
  const key = quote(field.name);
  const clearOne = ({ box }) => { box.checked = false; };
  return {
    element,
    conditions() {
      const chosen = checked();
      if (chosen.length === 0) return [];
      if (isList) {
        return chosen.map((choice) => ({
          text: `${key} contains ${literal(choice.value)}`,
          label: `${field.name} contains ${spell(choice.value)}`,
          clear: () => clearOne(choice),
        }));
      }
      const values = chosen.map(({ value }) => value);
      return [{
        text: `${key} in ${values.map(literal).join(",")}`,
        label: `${field.name}: ${values.map(spell).join(", ")}`,
        clear: () => chosen.forEach(clearOne),
      }];
    },
  };
}

function makeRange(field) {
  const type = field.type;
  const from = make("input", { type, step: "any" });
  const to = make("input", { type, step: "any" });
  if (type === "number" && field.values) {
    from.placeholder = String(field.values[0]);
    to.placeholder = String(field.values.at(-1));
  }
  const labels = [make("label", {}, "from ", from), make("label", {}, "to ", to)];
  const row = make("div", { className: "range" }, ...labels);
  const write = type === "number" ? String : quote;
  const bound = (input, operator) => ({
    text: `${quote(field.name)}${operator}${write(input.value)}`,
    label: `${field.name} ${operator === ">=" ? "≥" : "≤"} ${input.value}`,
    clear: () => { input.value = ""; },
  });
  return {
    element: make("fieldset", {}, make("legend", {}, field.name), row),
    conditions: () => [
      ...(from.value === "" ? [] : [bound(from, ">=")]),
      ...(to.value === "" ? [] : [bound(to, "<=")]),
    ],
  };
}

function makeInput(field, isList) {
  const input = make("input", { type: "text", maxLength: 1000 });
  const operator = isList ? "contains" : "=";
  const label = make("label", {}, isList ? "contains " : "equals ", input);
  const write = field.type === "number list" ? String : quote;
  return {
    element: make("fieldset", {}, make("legend", {}, field.name), label),
    conditions: () => (input.value === "" ? [] : [{
      text: `${quote(field.name)} ${operator} ${write(input.value)}`,
      label: `${field.name} ${operator} ${input.value}`,
      clear: () => { input.value = ""; },
    }]),
  };
}

/** Return a text in the quotes of conditions. */
function quote(text) {
  return `"${text.replaceAll('"', '""')}"`;
}

function literal(value) {
  return typeof value === "string" ? quote(value) : String(value);
}

function spell(value) {
  return value === "" ? "(empty)" : String(value);
}
