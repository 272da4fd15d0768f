// A text, what fires on it, and one feature's card.

import * as address from "./address.js";
import { ask } from "./api.js";
import { showCard } from "./card.js";
import { field, figure, fill, h } from "./dom.js";
import { examples } from "./examples.js";
import { finder } from "./finder.js";
import { Running, formProblem } from "./form.js";
import { featureOf, nameOf, served } from "./server.js";
import * as steering from "./steering.js";
import { Strip, named } from "./strip.js";

const MANY = 12;

export function explore(values) {
  const example = examples();
  const state = {
    text: values.get("text") ?? example.text,
    source: values.get("source") ?? example.source,
    rank: values.get("rank") ?? "relative",
    feature: featureOf(values.get("feature") ?? (values.has("text") ? "" : example.feature ?? "")),
    result: null,
  };
  return new Explore(state, example);
}

class Explore {
  constructor(state, example) {
    this.state = state;
    this.example = example;
    this.card = h("article", { class: "card", "aria-label": "Feature" });
    this.strip = h("div", { class: "reading" });
    this.list = h("ol", { class: "features" });
    this.listTitle = h("h3", {}, "What fires here");
    this.form = this.#form();
    this.element = h("div", { class: "explore" },
      h("h1", { class: "unseen" }, "Explore"),
      this.form,
      this.strip,
      this.#tries(),
      h("div", { class: "columns" },
        h("section", { class: "column", "aria-label": "Features" },
          this.listTitle, this.list,
          finder({ label: "Find features by words", hint: "In labels and in the texts on which they fire", withContexts: true, onPick: (one) => this.pick(one) })),
        this.card));
    this.running.start((signal) => this.read(signal));
  }

  #form() {
    const { text, source, rank } = this.state;
    const option = (value, words, now) => h("option", { value, set: { selected: value === now } }, words);
    this.text = h("textarea", { rows: 2, spellcheck: "false", class: "prose", set: { value: text }, on: { keydown: (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    } } });
    this.source = h("select", { on: { change: () => this.form.requestSubmit() } }, served().sources.map((one) => option(one, one, source)));
    this.rank = h("select", { on: { change: () => this.form.requestSubmit() } },
      option("relative", "what is peculiar to this text", rank), option("activation", "what fires most", rank));
    this.button = h("button", { class: "primary" }, "Read");
    const form = h("form", { class: "ask" },
      field("Text", this.text, "prompt"),
      h("div", { class: "row" }, field("Source", this.source, "source"), field("First", this.rank, "rank_by"), this.button),
      formProblem());
    this.running = new Running(form, this.button, "Read");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const isStop = this.running.isOn && event.submitter === this.button;
      if (isStop) this.running.stop();
      else this.running.start((signal) => this.read(signal));
    });
    return form;
  }

  async read(signal) {
    const { state } = this;
    const kept = state.result ? null : state.feature;
    Object.assign(state, { text: this.text.value, source: this.source.value, rank: this.rank.value });
    const body = { prompt: state.text, source: state.source, rank_by: state.rank, num_results: MANY };
    [state.result] = (await ask("v1/activations", { body, signal })).results;
    this.#showList(state.result.features, "What fires here");
    const first = kept ?? state.result.features[0];
    if (first) await this.pick(first, signal);
    else this.#paint(null);
  }

  /** Colours the text by a feature and shows its card. */
  async pick(feature, signal) {
    this.state.feature = { source: feature.source, index: feature.index };
    this.#remember();
    for (const button of this.list.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", button.dataset.name === nameOf(feature) ? "true" : "false");
    }
    this.shown?.abort();
    this.shown = new AbortController();
    const either = signal ? AbortSignal.any([signal, this.shown.signal]) : this.shown.signal;
    try {
      this.#paint(await this.#valuesOf(feature, either));
      await showCard(this.card, feature, {
        text: this.state.text, signal: either, onOther: (one) => this.pick(one), onSteer: (known) => this.#steer(known),
      });
    } catch (error) {
      if (error.name !== "AbortError") this.#tell(error);
    }
  }

  #tell(error) {
    if (error.status === undefined) throw error;
    fill(this.card, h("p", { class: "form-problem", role: "alert" }, error.said));
  }

  async #valuesOf(feature, signal) {
    const listed = this.state.result.features.find((one) => nameOf(one) === nameOf(feature));
    if (listed) return listed;
    const body = { prompt: this.state.text, source: feature.source, index: feature.index };
    return (await ask("v1/activations", { body, signal })).results[0].features[0];
  }

  #paint(feature) {
    const { result } = this.state;
    const name = feature ? feature.label ?? nameOf(feature) : "nothing";
    const strip = new Strip({
      label: `The text, coloured by ${name}`, hasStart: result.has_bos,
      onPick: (position) => this.running.start((signal) => this.#showToken(position, signal)),
    });
    strip.add(result.tokens);
    if (feature) strip.paint(feature.values, feature.max_value);
    const strongest = feature && feature.max_value > 0 ? `strongest ${figure(feature.max_value)} on “${named(result.tokens[feature.max_value_index])}”` : "it does not fire on this text";
    fill(this.strip,
      h("p", { class: "legend", role: "status" }, "Coloured by ", h("strong", {}, name), feature && ` · ${strongest}`),
      strip.element);
  }

  /** What fires on one token, with a way back to what fires on the text. */
  async #showToken(position, signal) {
    const { text, source, result } = this.state;
    const body = { prompt: text, source, top_k: MANY };
    const [answer] = (await ask("v1/top-k", { body, signal })).results;
    const features = answer.positions[position].top_features.map(({ feature_index: index, activation_value: value, label }) => (
      { source, index, label, max_value: value }));
    const back = h("button", { type: "button", class: "link", on: { click: () => this.#showList(result.features, "What fires here") } }, "the whole text");
    this.#showList(features, `What fires on “${named(result.tokens[position])}”`, back);
  }

  #showList(features, title, back = null) {
    const most = Math.max(...features.map((one) => one.max_value), 0);
    const picked = this.state.feature && nameOf(this.state.feature);
    fill(this.listTitle, features.length ? title : title.replace("What", "Nothing"), back && [" · ", back]);
    fill(this.list, ...features.map((one) => {
      const bar = h("span", { class: "bar", "aria-hidden": "true" });
      bar.style.setProperty("--part", (one.max_value / most).toFixed(3));
      return h("li", {}, h("button", { type: "button", class: "feature", "aria-pressed": nameOf(one) === picked ? "true" : "false", "data-name": nameOf(one), on: { click: () => this.pick(one) } },
        h("span", { class: "feature-name" }, one.label ?? nameOf(one)),
        h("span", { class: "feature-where" }, nameOf(one)),
        bar, h("span", { class: "value" }, figure(one.max_value))));
    }));
  }

  #tries() {
    return h("aside", { class: "tries", "aria-label": "Three things to try" },
      h("h2", {}, "Try"),
      h("ul", {}, this.example.tries.map(({ words, view, values }) => h("li", {}, h("a", { href: address.addressOf(view, values) }, words)))));
  }

  #steer(known) {
    steering.add(known);
    location.hash = address.addressOf("steer", { prompt: this.example.steer.prompt, f: steering.asTexts(), watch: nameOf(known) });
  }

  #remember() {
    const { text, source, rank, feature } = this.state;
    address.write("explore", { text, source, rank, feature: feature && nameOf(feature) });
  }
}
