// Writing on, plain and steered side by side, with one feature watched in both.

import * as address from "./address.js";
import { events } from "./api.js";
import { field, figure, fill, h } from "./dom.js";
import { examples } from "./examples.js";
import { Running, formProblem } from "./form.js";
import { featureOf, nameOf } from "./server.js";
import * as steering from "./steering.js";
import { Strip } from "./strip.js";

const WORDS = "Write";

export function steer(values) {
  const example = examples().steer;
  const isBare = !values.has("prompt") && !values.has("f");
  if (values.has("f") || (isBare && !steering.chosen.length)) steering.setFromTexts(isBare ? example.f : values.getAll("f"));
  return new Steer({
    prompt: values.get("prompt") ?? example.prompt,
    watched: values.get("watch") ?? example.watch,
    tokens: values.get("n") ?? "24",
    temperature: values.get("t") ?? "0",
    seed: values.get("seed") ?? "16",
    begins: values.get("go") === "1",
  });
}

class Steer {
  constructor(asked) {
    this.watched = { name: asked.watched ?? (steering.chosen[0] && nameOf(steering.chosen[0])), pick: (name) => {
      this.watched.name = name;
      this.#remember();
    } };
    this.form = this.#form(asked);
    this.out = h("div", { class: "outputs" });
    this.said = h("p", { class: "unseen", role: "status" });
    this.element = h("div", { class: "steer" }, h("h1", { class: "unseen" }, "Steer"), this.form, this.out, this.said);
    steering.onChange(() => this.#changed());
    if (asked.begins) this.running.start((signal) => this.write(signal));
  }

  #form(asked) {
    const number = (value, attributes) => h("input", { type: "number", required: true, ...attributes, set: { value } });
    this.prompt = h("textarea", { rows: 2, spellcheck: "false", class: "prose", set: { value: asked.prompt } });
    this.tokens = number(asked.tokens, { step: 1 });
    this.temperature = number(asked.temperature, { step: "any" });
    this.seed = number(asked.seed, { step: 1 });
    const button = h("button", { class: "primary" }, WORDS);
    const form = h("form", { class: "ask", novalidate: true },
      field("Prompt", this.prompt, "prompt"),
      steering.steeringList({ watched: this.watched }),
      h("div", { class: "row" },
        field("Tokens", this.tokens, "max_new_tokens"),
        field("Temperature", this.temperature, "temperature"),
        field("Seed", this.seed, "seed"),
        button),
      formProblem());
    this.running = new Running(form, button, WORDS);
    form.addEventListener("submit", this.running.onSubmit((signal) => this.write(signal)));
    return form;
  }

  #changed() {
    if (!steering.chosen.some((one) => nameOf(one) === this.watched.name)) {
      this.watched.name = steering.chosen[0] && nameOf(steering.chosen[0]);
    }
    this.#remember();
  }

  #remember() {
    address.write("steer", {
      prompt: this.prompt.value, f: steering.asTexts(), watch: this.watched.name,
      n: this.tokens.value, t: this.temperature.value, seed: this.seed.value,
    });
  }

  async write(signal) {
    this.#remember();
    const watched = this.watched.name && featureOf(this.watched.name);
    const picked = steering.chosen.find((one) => nameOf(one) === this.watched.name);
    const known = picked && (await steering.described(picked));
    const body = {
      prompt: this.prompt.value,
      features: steering.asFeatures(),
      max_new_tokens: numberOf(this.tokens),
      temperature: numberOf(this.temperature),
      seed: numberOf(this.seed),
      ...(watched ? { watch: [watched] } : {}),
      compare: steering.chosen.length > 0,
      stream: true,
      deltas: true,
    };
    const label = known?.label ?? this.watched.name;
    const columns = body.compare
      ? { default: new Column("Plain", "plain", label), steered: new Column("Steered", "steered", label) }
      : { steered: new Column("The model’s own", "plain", label) };
    try {
      for await (const event of events("v1/steer", body, signal)) {
        if (!columns.steered.element.isConnected) {
          fill(this.out, ...Object.values(columns).map((column) => column.element), watched && legend(label));
        }
        for (const [name, column] of Object.entries(columns)) column.add(event[name], known?.max, body.prompt);
      }
    } finally {
      for (const column of Object.values(columns)) column.end();
      this.said.textContent = Object.values(columns).map((column) => column.spoken).join(" ");
    }
  }
}

/** What an input says; what is no number goes to the server as it is, which says what is wrong with it. */
function numberOf(input) {
  return input.value.trim() === "" ? null : Number(input.value);
}

function legend(label) {
  return h("p", { class: "legend" }, "Coloured by ", h("strong", {}, label), " at each token: in the steered text as it came to that place, before the steering is added.");
}

/** One text as it comes, its tokens coloured by what was watched there. */
class Column {
  constructor(title, kind, label) {
    this.state = h("span", { class: "state" }, "…");
    this.strip = new Strip({ label: label ? `${title}, coloured by ${label}` : title });
    this.title = title;
    this.values = [];
    this.written = 0;
    this.ended = null;
    this.element = h("article", { class: `output ${kind}`, "aria-busy": "true", "aria-label": title },
      h("header", {}, h("h2", {}, title), this.state), this.strip.element);
  }

  /** most: the feature's largest known activation. prompt: whose tokens come first, behind a start token if there is one. */
  add(news, most, prompt) {
    if (!news) return;
    const watched = news.watch;
    if (watched && !this.strip.tokens.length) {
      this.strip.hasStart = !prompt.startsWith(watched.tokens[0]);
      this.strip.add(watched.tokens, { isPrompt: true });
    }
    this.strip.add(news.tokens);
    this.written += news.tokens.length;
    if (watched) {
      const [{ before, after }] = watched.values;
      this.values.push(...(before ?? after));
      this.strip.paint(this.values, Math.max(most ?? 0, ...this.values.slice(this.strip.hasStart ? 1 : 0)));
    }
    this.ended = news.finish_reason ?? this.ended;
    this.state.textContent = `${this.written} tokens`;
  }

  /** For those who do not see it, once it has ended. */
  get spoken() {
    return this.written ? `${this.title}: ${this.strip.tokens.slice(-this.written).map((one) => one.token).join("")}` : "";
  }

  end() {
    this.element.setAttribute("aria-busy", "false");
    const why = { length: "", stop: ", ended by itself", stop_rule: ", ended by a rule" }[this.ended] ?? ", stopped";
    const own = this.values.slice(-this.written);
    const strongest = own.length ? ` · up to ${figure(Math.max(...own))} where it writes` : "";
    this.state.textContent = `${this.written} tokens${why}${strongest}`;
  }
}
