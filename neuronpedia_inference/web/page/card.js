// Everything known of one feature, on a card.

import { copyAs } from "./code.js";
import { figure, fill, h, often } from "./dom.js";
import { card, nameOf } from "./server.js";
import { steeringStrength } from "./steering.js";
import { excerpt, shown } from "./strip.js";

const MANY_CONTEXTS = 4;
const BINS = 16;

/**
 * Fills `place` with the card of a feature once the server has told it.
 * text: what examples to copy are about; onSteer(known), onOther(feature) when its buttons are pressed.
 */
export async function showCard(place, feature, { text, onSteer, onOther, signal }) {
  place.setAttribute("aria-busy", "true");
  try {
    const known = await card(feature, signal);
    fill(place, ...parts(known, text, onSteer, onOther));
  } finally {
    place.setAttribute("aria-busy", "false");
  }
}

function parts(known, text, onSteer, onOther) {
  const name = nameOf(known);
  const most = known.max ?? Math.max(0, ...known.contexts.flatMap((context) => context.values));
  return [
    h("header", { class: "card-head" },
      h("h3", {}, known.label ?? "A feature without a label"),
      h("p", { class: "where" }, h("code", {}, name), ` · ${known.architecture} at `, h("code", {}, known.hook))),
    numbers(known),
    h("p", { class: "row" },
      h("button", { type: "button", class: "primary", on: { click: () => onSteer(known) } }, "Steer with it")),
    contexts(known, most),
    effects(known),
    neighbours(known, onOther),
    h("section", {}, h("h4", {}, "Copy as"), copyAs(known, text, steeringStrength(known))),
  ];
}

function numbers(known) {
  const rows = [
    ["fires", often(known.density)],
    ["largest", known.max == null ? null : figure(known.max)],
    ["mean where it fires", known.mean == null ? null : figure(known.mean)],
    ["threshold", known.threshold == null ? null : figure(known.threshold)],
    ["decoder norm", known.norm == null ? null : figure(known.norm)],
  ];
  return h("dl", { class: "numbers" }, rows.filter(([, value]) => value !== null).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function contexts(known, most) {
  if (!known.contexts.length) {
    return h("section", {}, h("h4", {}, "Where it fires most"), h("p", { class: "hint" }, "No texts are known for it."));
  }
  const [first, rest] = [known.contexts.slice(0, MANY_CONTEXTS), known.contexts.slice(MANY_CONTEXTS)];
  return h("section", { class: "contexts" },
    h("h4", {}, "Where it fires most"),
    first.map((context) => excerpt(context, most)),
    rest.length > 0 && h("details", {}, h("summary", {}, `${rest.length} more`), rest.map((context) => excerpt(context, most))),
    histogram(known.contexts.flatMap((context) => context.values), most));
}

/** How its activations on the tokens of its contexts are spread. */
function histogram(values, most) {
  const firing = values.filter((value) => value > 0);
  if (firing.length < 2 || !(most > 0)) return null;
  const bins = Array(BINS).fill(0);
  for (const value of firing) bins[Math.min(BINS - 1, Math.floor((BINS * value) / most))] += 1;
  const highest = Math.max(...bins);
  const middle = firing.sort((a, b) => a - b)[Math.floor(firing.length / 2)];
  const said = `Activations on the ${values.length} tokens of these texts: it fires on ${firing.length}, half of them below ${figure(middle)}, the largest ${figure(firing.at(-1))}.`;
  const bars = bins.map((count) => {
    const bar = h("span", {});
    bar.style.setProperty("--part", (count / highest).toFixed(3));
    return bar;
  });
  return h("figure", { class: "histogram" },
    h("div", { class: "bars", role: "img", "aria-label": said }, bars),
    h("figcaption", {}, h("span", {}, "0"), h("span", {}, `activation on these texts’ tokens, where not 0 (${firing.length} of ${values.length})`), h("span", {}, figure(most))));
}

function effects(known) {
  if (known.no_tokens_because) return h("p", { class: "hint" }, known.no_tokens_because);
  const most = Math.max(...[...known.promoted, ...known.suppressed].map((one) => Math.abs(one.logit)), 1e-9);
  const list = (title, items, kind) => h("div", {}, h("h4", {}, title),
    h("ol", { class: `effects ${kind}` }, items.map((one) => {
      const bar = h("span", { class: "bar", "aria-hidden": "true" });
      bar.style.setProperty("--part", (Math.abs(one.logit) / most).toFixed(3));
      return h("li", {}, h("span", { class: "word" }, shown(one.token).replace(/^ /, "␣")), bar, h("span", { class: "value" }, figure(one.logit)));
    })));
  return h("section", { class: "pair" }, list("Makes likelier", known.promoted, "up"), list("Makes less likely", known.suppressed, "down"));
}

function neighbours(known, onOther) {
  if (!known.neighbours.length) return null;
  return h("section", {}, h("h4", {}, "Nearest by decoder"),
    h("ul", { class: "neighbours" }, known.neighbours.map((one) => h("li", {},
      h("button", { type: "button", class: "link", on: { click: () => onOther(one) } }, one.label ?? nameOf(one)),
      h("span", { class: "value" }, figure(one.cosine_similarity))))));
}
