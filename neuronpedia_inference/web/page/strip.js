// Texts whose tokens are coloured by numbers.

import { figure, h } from "./dom.js";

/** How strong a colour is: 0 to 1. */
export function heatOf(value, most) {
  return most > 0 && value > 0 ? Math.min(1, value / most) : 0;
}

export function shown(token) {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

export function named(token) {
  return token.trim() || (token.includes("\n") ? "line break" : "blank");
}

/**
 * Tokens in a row with a single place in the order of focus: arrows go from one to the next.
 * hasStart: the first is the model's own start token. onPick(position) when one is pressed.
 */
export class Strip {
  constructor({ label, hasStart = false, onPick = null }) {
    this.tokens = [];
    this.hasStart = hasStart;
    this.onPick = onPick;
    this.row = h("div", { class: "strip", role: "group", "aria-label": label, on: {
      keydown: (event) => this.#move(event),
      focusin: (event) => this.#enter(event.target),
      pointerover: (event) => this.#tell(event.target),
      click: (event) => this.#pick(event.target),
    } });
    this.readout = h("p", { class: "readout", "aria-hidden": "true" }, " ");
    this.element = h("div", { class: "stripe" }, this.row, this.readout);
  }

  add(tokens, { isPrompt = false } = {}) {
    for (const token of tokens) {
      const position = this.tokens.length;
      const isStart = this.hasStart && position === 0;
      const box = h("span", {
        role: this.onPick ? "button" : "img", class: `token${isPrompt ? " prompt" : ""}${isStart ? " start" : ""}`,
        tabindex: position ? "-1" : "0", "data-position": position, "aria-label": named(token),
      }, isStart ? "start" : shown(token));
      this.tokens.push({ token, box, value: null });
      this.row.append(box);
      if (token.includes("\n")) this.row.append(h("br"));
    }
  }

  /** values: from the first token on, as many as are known; null is unknown. */
  paint(values, most) {
    values.forEach((value, position) => {
      const one = this.tokens[position];
      if (!one) return;
      one.value = value;
      const isLeftOut = this.hasStart && position === 0;
      one.box.style.setProperty("--heat", isLeftOut || value == null ? 0 : heatOf(value, most).toFixed(3));
      one.box.setAttribute("aria-label", value == null ? named(one.token) : `${named(one.token)}, ${figure(value)}`);
    });
  }

  #move(event) {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#pick(event.target);
    }
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const from = Number(event.target.dataset.position ?? 0);
    const to = Math.max(0, Math.min(this.tokens.length - 1, from + steps[event.key]));
    this.tokens[to].box.focus();
  }

  #enter(target) {
    for (const { box } of this.tokens) box.tabIndex = box === target ? 0 : -1;
    this.#tell(target);
  }

  #tell(target) {
    const one = this.tokens[target.dataset?.position];
    if (one) this.readout.textContent = `${shown(one.token)}  ${one.value == null ? "not read yet" : figure(one.value)}`;
  }

  #pick(target) {
    if (target.dataset?.position !== undefined) this.onPick?.(Number(target.dataset.position));
  }
}

/** A short text whose tokens are coloured, to look at only; what matters of it is said in words too. */
export function excerpt({ tokens, values, origin }, most) {
  const strongest = values.indexOf(Math.max(...values));
  return h("figure", { class: "excerpt" },
    h("p", {}, tokens.map((token, place) => {
      const span = h("span", { class: "tint" }, shown(token));
      span.style.setProperty("--heat", heatOf(values[place], most).toFixed(3));
      return span;
    })),
    h("figcaption", {}, `strongest on “${named(tokens[strongest])}”, ${figure(values[strongest])}`, origin && ` · ${origin}`),
  );
}
