// The page: what this server is, and one view of it at a time, as the address says.

import * as address from "./address.js";
import { chat } from "./chat.js";
import { fill, h } from "./dom.js";
import { explore } from "./explore.js";
import { changeKey } from "./gate.js";
import { lens } from "./lens.js";
import { meet, served, serves } from "./server.js";
import { steer } from "./steer.js";
import { sweep } from "./sweep.js";

const VIEWS = [
  { name: "explore", words: "Explore", draw: explore, isServed: () => served().sources.length > 0 && serves("activations") },
  { name: "steer", words: "Steer", draw: steer, isServed: () => serves("steer") },
  { name: "chat", words: "Chat", draw: chat, isServed: () => serves("steer") && served().chat },
  { name: "lens", words: "Lens", draw: lens, isServed: () => serves("lens_logit") },
  { name: "sweep", words: "Sweep", draw: sweep, isServed: () => serves("sweep") },
];
const view = document.getElementById("view");
const main = document.getElementById("main");
let available = [];
let current = null;

function show() {
  const { view: name, values } = address.read();
  const chosen = available.find((one) => one.name === name) ?? available[0];
  fill(document.getElementById("views"), ...available.map((one) => h("li", {},
    h("a", { href: `#${one.name}`, "aria-current": one === chosen ? "page" : null }, one.words))));
  document.title = `${chosen.words} · Neuronpedia inference`;
  current?.running.stop();
  current = chosen.draw(values);
  fill(view, current.element);
}

function tellServed() {
  const { model, device, sources } = served();
  const many = { 0: "no sources", 1: sources[0] }[sources.length] ?? `${sources.length} sources`;
  fill(document.getElementById("served"), h("strong", {}, model), ` on ${device} · ${many}`);
}

async function begin() {
  try {
    await meet();
  } catch (error) {
    if (error.status === undefined) throw error;
    fill(view, h("p", { class: "form-problem", role: "alert" }, error.said),
      h("p", {}, h("button", { type: "button", on: { click: begin } }, "Try again")));
    return;
  }
  available = VIEWS.filter((one) => one.isServed());
  tellServed();
  show();
}

addEventListener("hashchange", () => available.length && show());
document.getElementById("key").addEventListener("click", () => changeKey(begin));
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
begin();
