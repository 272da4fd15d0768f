// What is steered with: one list for writing and for chats, and its rows of sliders.

import { fill, h } from "./dom.js";
import { finder } from "./finder.js";
import { card, featureOf, nameOf } from "./server.js";

const STRENGTH_OF_MAX = 2.3;
const DEFAULT_STRENGTH = 60;

/** { source, index, strength, label, max, told }: label and max once they are known; see `described`. */
export const chosen = [];
const listeners = new Set();

export function onChange(listener) {
  listeners.clear(); // of the view that is shown
  listeners.add(listener);
}

function changed() {
  for (const listener of listeners) listener();
}

/** A strength at which a feature is likely to be heard. */
export function steeringStrength(known) {
  return known.max ? Math.round(STRENGTH_OF_MAX * known.max) : DEFAULT_STRENGTH;
}

/** One that is there keeps its strength: a search may answer after that was set. */
export function add(known) {
  const isThere = chosen.some((one) => nameOf(one) === nameOf(known));
  if (!isThere) chosen.push({ source: known.source, index: known.index, strength: steeringStrength(known), label: known.label });
  changed();
}

/** As addresses say it: "15-res-4k/1113@70". */
export function asTexts() {
  return chosen.map((one) => `${nameOf(one)}@${one.strength}`);
}

export function setFromTexts(texts) {
  const known = new Map(chosen.map((one) => [nameOf(one), one]));
  chosen.length = 0;
  for (const text of texts) {
    const [name, strength] = text.split("@");
    const feature = featureOf(name);
    if (feature && Number.isFinite(Number(strength))) {
      chosen.push({ ...known.get(nameOf(feature)), ...feature, strength: Number(strength) });
    }
  }
}

/** For a request. */
export function asFeatures() {
  return chosen.map(({ source, index, strength }) => ({ source, index, strength }));
}

/** The list with its sliders, and a search that adds to it. `watched`: whether one of them is picked to be watched. */
export function steeringList({ watched = null } = {}) {
  const rows = h("ul", { class: "steers" });
  const draw = () => {
    if (!chosen.length) fill(rows, h("li", { class: "hint" }, "Nothing yet: the text is the model’s own. Find a feature below."));
    else fill(rows, ...chosen.map((one) => row(one, watched, draw)));
  };
  const find = finder({ label: "Add a feature", hint: "Words, or its name, such as 15-res-4k/1113", onPick: (known) => { add(known); draw(); } });
  draw();
  return h("div", { class: "field", "data-field": "features" }, h("h2", {}, "Steer with"), rows, h("p", { class: "problem", hidden: true }), find);
}

/** The same once its label and largest activation are known, where the server has such a feature. Asked for once. */
export function described(one) {
  one.told ??= card(one).then(({ label, max }) => Object.assign(one, { label, max }), () => one);
  return one.told;
}

/** What is learnt of its feature is written into it where it stands: somebody may be typing a strength. */
function row(one, watched, draw) {
  const set = (control, other) => () => {
    if (control.value === "" || !Number.isFinite(Number(control.value))) return;
    one.strength = Number(control.value);
    other.value = control.value;
    changed();
  };
  const slider = h("input", { type: "range", step: 1 });
  const number = h("input", { type: "number", step: "any", set: { value: one.strength } });
  slider.addEventListener("input", set(slider, number));
  number.addEventListener("input", set(number, slider));
  const remove = h("button", { type: "button", class: "quiet", on: { click: () => {
    chosen.splice(chosen.indexOf(one), 1);
    draw();
    changed();
  } } }, "Remove");
  const watch = watched && h("label", { class: "watch" },
    h("input", { type: "radio", name: "watched", value: nameOf(one), set: { checked: nameOf(one) === watched.name }, on: { change: () => watched.pick(nameOf(one)) } }), "watch");
  const title = h("strong", {});
  const tell = () => {
    const name = one.label ?? nameOf(one);
    const bound = Math.max(100, Math.abs(one.strength), Math.ceil((5 * (one.max ?? 30)) / 50) * 50);
    title.textContent = name;
    slider.setAttribute("aria-label", `Strength of ${name}`);
    number.setAttribute("aria-label", `Strength of ${name}, as a number`);
    remove.setAttribute("aria-label", `Remove ${name}`);
    Object.assign(slider, { min: -bound, max: bound, value: one.strength });
  };
  tell();
  described(one).then(tell);
  return h("li", {},
    h("p", { class: "steer-name" }, title, " ", h("code", {}, nameOf(one))),
    h("div", { class: "row" }, slider, number, watch, remove));
}
