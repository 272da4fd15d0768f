// Forms that ask the server: what is refused stands at its field, what takes long can be stopped.

import { h } from "./dom.js";

/** Shows a refusal at the field that it names, or at the end of the form. */
export function tellRefusal(form, refused) {
  const name = refused.field;
  const box = name && [...form.querySelectorAll("[data-field]")].find((one) => matches(one.dataset.field, name));
  const problem = box ? box.querySelector(".problem") : form.querySelector(".form-problem");
  const said = box ? refused.said.replace(`${name}: `, "") : refused.said;
  problem.textContent = said[0].toUpperCase() + said.slice(1) + (refused.requestId && refused.status >= 500 ? ` (request ${refused.requestId})` : "");
  problem.hidden = false;
  if (!box) return;
  const control = box.querySelector("input, textarea, select");
  control.setAttribute("aria-invalid", "true");
  control.focus();
}

function matches(field, name) {
  return name === field || name.startsWith(`${field}.`);
}

export function clearRefusals(form) {
  for (const one of form.querySelectorAll(".problem, .form-problem")) one.hidden = true;
  for (const one of form.querySelectorAll("[aria-invalid]")) one.removeAttribute("aria-invalid");
}

export function formProblem() {
  return h("p", { class: "form-problem", role: "alert", hidden: true });
}

/**
 * One request at a time: `start(work)` calls work(signal), after stopping what was under way. While it runs the
 * submit button is "Stop". Refusals are shown in the form; anything else that is thrown is a fault of ours.
 */
export class Running {
  constructor(form, button, words) {
    this.form = form;
    this.button = button;
    this.words = words;
    this.controller = null;
  }

  get isOn() {
    return this.controller !== null;
  }

  stop() {
    this.controller?.abort();
  }

  async start(work) {
    this.stop();
    const controller = new AbortController();
    this.controller = controller;
    clearRefusals(this.form);
    this.#show(true);
    try {
      await work(controller.signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === undefined) throw error;
      tellRefusal(this.form, error);
    } finally {
      if (this.controller === controller) {
        this.controller = null;
        this.#show(false);
      }
    }
  }

  #show(isOn) {
    this.button.textContent = isOn ? "Stop" : this.words;
    this.button.classList.toggle("stop", isOn);
    this.form.setAttribute("aria-busy", isOn ? "true" : "false");
  }

  /** For the form's submit: begins `work`, or stops what runs. */
  onSubmit(work) {
    return (event) => {
      event.preventDefault();
      if (this.isOn) this.stop();
      else this.start(work);
    };
  }
}
