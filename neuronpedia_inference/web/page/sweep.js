// One feature at several strengths.

import * as address from "./address.js";
import { ask } from "./api.js";
import { field, figure, fill, h } from "./dom.js";
import { examples } from "./examples.js";
import { Running, formProblem } from "./form.js";
import { featureOf } from "./server.js";

const STRENGTHS = "-40, 0, 20, 40, 60, 80, 100, 140";

export function sweep(values) {
  const example = examples().steer;
  return new Sweep({
    prompt: values.get("prompt") ?? example.prompt,
    feature: values.get("feature") ?? example.watch ?? "",
    strengths: values.get("strengths") ?? STRENGTHS,
  });
}

class Sweep {
  constructor({ prompt, feature, strengths }) {
    this.prompt = h("textarea", { rows: 2, class: "prose", spellcheck: "false", set: { value: prompt } });
    this.feature = h("input", { type: "text", spellcheck: "false", set: { value: feature } });
    this.strengths = h("input", { type: "text", inputmode: "text", set: { value: strengths } });
    const button = h("button", { class: "primary" }, "Sweep");
    const form = h("form", { class: "ask", novalidate: true },
      field("Prompt", this.prompt, "prompt"),
      h("div", { class: "row" }, field("Feature", this.feature, "features"), field("Strengths", this.strengths, "strengths"), button),
      formProblem());
    this.running = new Running(form, button, "Sweep");
    form.addEventListener("submit", this.running.onSubmit((signal) => this.run(signal)));
    this.out = h("div", {});
    this.element = h("div", { class: "sweep" }, h("h1", { class: "unseen" }, "Sweep"), form, this.out);
  }

  async run(signal) {
    address.write("sweep", { prompt: this.prompt.value, feature: this.feature.value, strengths: this.strengths.value });
    const strengths = this.strengths.value.split(/[\s,;]+/).filter(Boolean).map(Number);
    const feature = featureOf(this.feature.value) ?? { source: this.feature.value, index: null };
    const body = { prompt: this.prompt.value, features: [feature], strengths, max_new_tokens: 20 };
    const answer = await ask("v1/sweep", { body, signal });
    fill(this.out, table(answer));
  }
}

function table({ cells, suggested }) {
  const best = suggested?.strength;
  const rows = cells.map((cell) => h("tr", { class: cell.strength === best ? "suggested" : null },
    h("th", { scope: "row" }, figure(cell.strength), cell.strength === best && h("span", { class: "badge" }, "suggested")),
    h("td", { class: "prose" }, cell.text),
    h("td", { class: "value" }, figure(cell.judge?.logprob_per_token)),
    h("td", { class: "value" }, figure(cell.judge?.repetition))));
  return h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Texts by strength" },
    h("table", { class: "sweep-table" },
      h("thead", {}, h("tr", {}, ["Strength", "Text", "Log-probability per token", "Repetition"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows)));
}
