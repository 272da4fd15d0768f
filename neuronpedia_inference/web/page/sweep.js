// One feature at several strengths.

import * as address from "./address.js";
import { events } from "./api.js";
import { field, figure, fill, h } from "./dom.js";
import { examples } from "./examples.js";
import { Running, formProblem } from "./form.js";
import { featureOf } from "./server.js";
import { shown } from "./strip.js";

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
    const body = {
      prompt: this.prompt.value,
      features: [featureOf(this.feature.value) ?? { source: this.feature.value, index: null }],
      strengths: this.strengths.value.split(/[\s,;]+/).filter(Boolean).map(Number),
      max_new_tokens: 20,
      stream: true,
    };
    const table = new Table();
    for await (const event of events("v1/sweep", body, signal)) {
      if (!table.element.isConnected) fill(this.out, table.element);
      for (const cell of [...(event.default ?? []), ...(event.cells ?? [])]) table.add(cell);
      if (event.suggested) table.suggest(event.suggested);
    }
  }
}

/** A number as it was asked for. */
function exact(value) {
  return String(value).replace("-", "−");
}

/** The texts as they come, weakest strength first, with the plain one on top. */
class Table {
  constructor() {
    this.rows = [];
    this.body = h("tbody", {});
    this.said = h("p", { class: "legend", role: "status" }, "Writing …");
    const names = ["Strength", "Text", "Feature in it", "Log-probability per token", "Repeated"];
    this.element = h("figure", {},
      h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Texts by strength" },
        h("table", { class: "sweep-table" },
          h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name)))), this.body)),
      h("figcaption", {}, this.said));
  }

  add(cell) {
    const head = h("th", { scope: "row" }, cell.strength === null ? "plain" : exact(cell.strength));
    const row = h("tr", {}, head,
      h("td", { class: "prose" }, shown(cell.text.trim())),
      [cell.effects?.[0], cell.judge?.logprob_per_token, cell.judge?.repetition].map((value) => h("td", { class: "value" }, figure(value))));
    this.rows.push({ strength: cell.strength, row, head });
    this.rows.sort((a, b) => (a.strength ?? -Infinity) - (b.strength ?? -Infinity));
    fill(this.body, ...this.rows.map((one) => one.row));
  }

  suggest({ strengths: [best], most_lost: lost, most_repeated: repeated }) {
    const limits = `lose at most ${figure(lost)} nats per token to the plain one and repeat at most ${figure(repeated)} more`;
    this.said.textContent = best === null
      ? `No strength is suggested: none has an effect on texts that ${limits}.`
      : `Suggested: ${exact(best)}, the largest effect among the texts that ${limits}.`;
    for (const { strength, row, head } of this.rows) {
      if (best === null || strength !== best) continue;
      row.classList.add("suggested");
      head.append(h("span", { class: "badge" }, "suggested"));
    }
  }
}
