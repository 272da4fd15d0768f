// Features by words, or by their names.

import { figure, fill, h, often } from "./dom.js";
import { card, featureOf, nameOf, search } from "./server.js";
import { excerpt } from "./strip.js";

let finders = 0;

/** A field and what was found with it. onPick(feature) with one that was chosen. */
export function finder({ label, hint, onPick, withContexts = false }) {
  const id = `finder-${(finders += 1)}`;
  const input = h("input", { type: "search", id, "aria-describedby": `${id}-said`, autocomplete: "off", enterkeyhint: "search" });
  const said = h("p", { class: "hint", id: `${id}-said`, role: "status" }, hint);
  const found = h("ul", { class: "found" });
  let controller = null;

  const look = async () => {
    const words = input.value.trim();
    controller?.abort();
    if (!words) return;
    controller = new AbortController();
    said.textContent = "Searching …";
    try {
      const feature = featureOf(words);
      const features = feature ? [await card(feature, controller.signal)] : await search(words, controller.signal);
      said.textContent = features.length ? `${features.length} found for “${words}”` : `No feature has “${words}” in its label or contexts.`;
      fill(found, ...features.map((one) => result(one, withContexts, pick)));
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === undefined) throw error;
      said.textContent = error.said;
      fill(found);
    }
  };
  const pick = (one) => {
    if (!withContexts) {
      fill(found);
      input.value = "";
      said.textContent = `${one.label ?? nameOf(one)} was added.`;
    }
    onPick(one);
  };
  // No form: it may stand inside one.
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    look();
  });
  return h("div", { class: "finder", role: "search" },
    h("label", { for: id }, label),
    h("div", { class: "row" }, input, h("button", { type: "button", on: { click: look } }, "Find")),
    said, found);
}

function result(one, withContexts, pick) {
  const context = one.context ?? one.contexts?.[0];
  return h("li", {},
    h("button", { type: "button", class: "feature", on: { click: () => pick(one) } },
      h("span", { class: "feature-name" }, one.label ?? nameOf(one)),
      h("span", { class: "feature-where" }, nameOf(one), often(one.density) && ` · ${often(one.density)}`, one.max != null && ` · up to ${figure(one.max)}`)),
    withContexts && context && excerpt(context, one.max));
}
