// What stands between a request and its answer: a key that is wanted, a model that loads, a server that is full.

import { fill, h } from "./dom.js";
import { setKey } from "./key.js";

const LOADING_EVERY_S = 1;
let asking = null;

function place() {
  return document.getElementById("gate");
}

function close() {
  place().hidden = true;
  fill(place());
}

/** Resolves once a key was given. Who asks meanwhile waits for the same one. */
export function askForKey(wasWrong, signal) {
  const why = wasWrong ? "That key is not this server’s." : "This server asks for its key.";
  asking ??= new Promise((resolve) => openKeyField(why, wasWrong, resolve)).finally(() => {
    asking = null;
  });
  return until(asking, signal);
}

function openKeyField(why, wasWrong, resolve) {
  const input = h("input", {
    type: "password", id: "key-field", autocomplete: "off", spellcheck: "false", required: true,
    "aria-invalid": wasWrong ? "true" : null, "aria-describedby": "key-why",
  });
  const submit = (event) => {
    event.preventDefault();
    setKey(input.value.trim());
    close();
    document.getElementById("main").focus();
    resolve();
  };
  fill(
    place(),
    h("form", { class: "key-form", on: { submit } },
      h("label", { for: "key-field" }, why),
      h("div", { class: "row" }, input, h("button", { class: "primary" }, "Use it")),
      h("p", { class: "hint", id: "key-why" }, "It stays in the memory of this page, and is gone when you close or reload it."),
    ),
  );
  place().hidden = false;
  input.focus();
}

/** The field for another key, without having been asked for one. */
export function changeKey(retry) {
  asking ??= new Promise((resolve) => openKeyField("The key of this server", false, resolve)).then(retry).finally(() => {
    asking = null;
  });
}

/** Resolves when it is time to ask again: once a model has loaded, or after the seconds that the server names. */
export function waitOut(refused, signal) {
  return refused.code === "not_ready" ? whileLoading(refused, signal) : countDown(refused, signal);
}

async function whileLoading(refused, signal) {
  const step = h("strong", {}, stepOf(refused.message));
  fill(place(), h("p", {}, h("span", { class: "spinner", "aria-hidden": "true" }), "The model is loading: ", step));
  place().hidden = false;
  for (;;) {
    await pause(LOADING_EVERY_S, signal);
    const answer = await fetch("ready", { signal, cache: "no-store" }).catch(() => null);
    if (answer?.ok) break;
    const said = answer ? stepOf((await answer.json()).error) : "the server cannot be reached";
    if (said !== step.textContent) step.textContent = said;
  }
  close();
}

function stepOf(message) {
  return /\((.*)\)/.exec(message)?.[1] ?? message;
}

async function countDown(refused, signal) {
  let now;
  const pressed = new Promise((resolve) => (now = resolve));
  const left = h("span", { class: "count" });
  fill(
    place(),
    h("p", {}, refused.message,
      h("span", { class: "unseen" }, ` Asking again in ${refused.retryAfter} s.`),
      h("span", { "aria-hidden": "true" }, " Asking again in ", left, " s.")),
    h("button", { type: "button", on: { click: () => now() } }, "Ask now"),
  );
  place().hidden = false;
  const waited = (async () => {
    for (let seconds = refused.retryAfter; seconds > 0; seconds -= 1) {
      left.textContent = `${seconds}`;
      await pause(1, signal);
    }
  })();
  await until(Promise.race([waited, pressed]), signal).finally(close);
}

function pause(seconds, signal) {
  return until(new Promise((resolve) => setTimeout(resolve, 1000 * seconds)), signal);
}

function until(promise, signal) {
  if (!signal) return promise;
  signal.throwIfAborted();
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    promise.then(resolve, reject);
  });
}
