// A chat with the steered model, beside what it would say by itself.

import * as address from "./address.js";
import { events } from "./api.js";
import { field, fill, h } from "./dom.js";
import { Running, formProblem } from "./form.js";
import * as steering from "./steering.js";

const WORDS = "Send";

export function chat(values) {
  if (values.has("f")) steering.setFromTexts(values.getAll("f"));
  return new Chat(values.get("say") ?? "");
}

class Chat {
  constructor(say) {
    this.messages = [];
    this.log = h("div", { class: "log", role: "log", "aria-label": "Chat" });
    this.form = this.#form(say);
    this.element = h("div", { class: "chat" }, h("h1", { class: "unseen" }, "Chat"), h("div", { class: "columns" },
      h("section", { class: "column", "aria-label": "Conversation" }, this.log, this.form),
      h("section", { class: "card", "aria-label": "Steering" }, steering.steeringList())));
    steering.onChange(() => address.write("chat", { f: steering.asTexts() }));
    this.#welcome();
  }

  #welcome() {
    fill(this.log, h("p", { class: "hint" }, "The answer on the left goes on as the conversation; the one on the right is what the model says without steering."));
  }

  #form(say) {
    this.say = h("textarea", { rows: 2, class: "prose", set: { value: say }, on: { keydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey) return;
      event.preventDefault();
      if (!this.running.isOn) form.requestSubmit();
    } } });
    this.tokens = h("input", { type: "number", step: 1, set: { value: 48 } });
    const button = h("button", { class: "primary" }, WORDS);
    const anew = () => {
      this.running.stop();
      this.messages = [];
      this.#welcome();
    };
    const form = h("form", { class: "ask", novalidate: true },
      field("Say", this.say, "prompt", "Enter sends, Shift and Enter begin a line."),
      h("div", { class: "row" }, field("Tokens", this.tokens, "max_new_tokens"), button, h("button", { type: "button", class: "quiet", on: { click: anew } }, "Begin anew")),
      formProblem());
    this.running = new Running(form, button, WORDS);
    form.addEventListener("submit", this.running.onSubmit((signal) => this.ask(signal)));
    return form;
  }

  async ask(signal) {
    const said = this.say.value;
    const prompt = [...this.messages, { role: "user", content: said }];
    const isSteered = steering.chosen.length > 0;
    const body = {
      prompt, features: steering.asFeatures(), max_new_tokens: this.tokens.value === "" ? null : Number(this.tokens.value),
      compare: isSteered, stream: true, deltas: true,
    };
    const steered = h("p", { class: "prose" });
    const plain = isSteered ? h("p", { class: "prose" }) : null;
    const turn = h("div", { class: "turn", "aria-busy": "true" },
      h("div", { class: "message user" }, h("h2", {}, "You"), h("p", { class: "prose" }, said)),
      h("div", { class: "answers" },
        h("div", { class: "message steered" }, h("h2", {}, isSteered ? "Steered" : "Model"), steered),
        plain && h("div", { class: "message plain" }, h("h2", {}, "Plain"), plain)));
    try {
      for await (const event of events("v1/steer", body, signal)) {
        if (!turn.isConnected) this.#begin(turn);
        steered.append(event.steered.text);
        plain?.append(event.default?.text ?? "");
        turn.scrollIntoView({ block: "nearest" });
        this.messages = [...prompt, { role: "assistant", content: steered.textContent }];
      }
    } finally {
      turn.setAttribute("aria-busy", "false"); // what is read aloud waits for this
    }
  }

  #begin(turn) {
    if (!this.messages.length) fill(this.log);
    this.log.append(turn);
    this.say.value = "";
  }
}
