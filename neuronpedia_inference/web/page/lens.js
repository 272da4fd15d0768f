// What the model would say next if it ended behind each block: a grid of tokens and layers.

import * as address from "./address.js";
import { ask } from "./api.js";
import { field, figure, fill, h } from "./dom.js";
import { examples } from "./examples.js";
import { Running, formProblem } from "./form.js";
import { served, serves } from "./server.js";
import { shown } from "./strip.js";

const ROWS = 15;
const TOP = 3;
const KINDS = [["LOGIT_LENS", "logit lens", "lens_logit"], ["JACOBIAN_LENS", "Jacobian lens", "lens_jacobian"]];

export function lens(values) {
  return new Lens(values.get("text") ?? examples().lens, values.get("lens") ?? KINDS[0][0]);
}

class Lens {
  constructor(text, kind) {
    this.text = h("textarea", { rows: 2, class: "prose", spellcheck: "false", set: { value: text } });
    const button = h("button", { class: "primary" }, "Look");
    const kinds = KINDS.filter(([, , endpoint]) => serves(endpoint));
    this.kind = h("select", {}, kinds.map(([value, words]) => h("option", { value, set: { selected: value === kind } }, words)));
    const form = h("form", { class: "ask" },
      field("Text", this.text, "prompt"),
      h("div", { class: "row" }, kinds.length > 1 && field("Lens", this.kind, "type"), button),
      formProblem());
    this.running = new Running(form, button, "Look");
    form.addEventListener("submit", this.running.onSubmit((signal) => this.look(signal)));
    this.out = h("div", {});
    this.element = h("div", { class: "lens" }, h("h1", { class: "unseen" }, "Lens"), form, this.out);
    this.running.start((signal) => this.look(signal));
  }

  async look(signal) {
    const kind = this.kind.value;
    address.write("lens", { text: this.text.value, lens: kind });
    const { model, num_layers: n } = served();
    const step = Math.max(1, Math.ceil(n / ROWS));
    const layers = Array.from({ length: Math.ceil(n / step) }, (_, place) => n - 1 - place * step).reverse();
    const body = { model, type: [kind], prompt: this.text.value, top_n: TOP, layers, stream: false };
    const { meta, tokens } = await ask("v1/lens/prompt", { body, signal });
    fill(this.out, this.#grid(meta.layers_by_type[kind], tokens));
  }

  #grid(layers, tokens) {
    const head = h("tr", {}, h("th", { scope: "col" }, "behind block"), tokens.map((one) => h("th", { scope: "col" }, shown(one.token))));
    const rows = layers.map((layer, place) => ({ layer, place })).reverse().map(({ layer, place }) => h("tr", {},
      h("th", { scope: "row" }, `${layer}`),
      tokens.map((one) => cell(one.results[0].top_tokens[place], one.results[0].top_probs[place]))));
    return h("figure", { class: "grid" },
      h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "What comes next, by token and block" },
        h("table", {}, h("thead", {}, head), h("tbody", {}, rows))),
      h("figcaption", { class: "legend" }, "The likeliest next token behind each block, coloured by its probability, and two more under the pointer."));
  }
}

function cell(words, shares) {
  const all = words.map((word, place) => `${shown(word)} ${figure(100 * shares[place])} %`);
  const box = h("td", { title: all.join("\n") }, shown(words[0] ?? ""), h("span", { class: "unseen" }, `, ${figure(100 * (shares[0] ?? 0))} %`));
  box.style.setProperty("--heat", (shares[0] ?? 0).toFixed(3));
  return box;
}
