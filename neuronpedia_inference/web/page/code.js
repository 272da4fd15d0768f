// Requests as programs write them.

import { h } from "./dom.js";
import { served, serves } from "./server.js";

function root() {
  return new URL(".", location.href).href.replace(/\/$/, "");
}

function curl(path, body) {
  const keyed = "  -H \"X-SECRET-KEY: $SECRET\" \\\n";
  return `curl -s ${root()}/${path} \\\n${keyed}  -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(body, null, 1).replaceAll("'", "'\\''")}'`;
}

const python = (value) => JSON.stringify(value);

/** Reading one feature of a text, and steering with it. */
function ofFeature(feature, text, strength) {
  const steered = { prompt: text, features: [{ source: feature.source, index: feature.index, strength }], max_new_tokens: 24 };
  const ways = {
    curl: curl("v1/steer", steered),
    Python: [
      "import os",
      "import neuronpedia_inference as ni",
      "",
      `m = ni.connect(${python(root())}, os.environ.get("SECRET"))`,
      `feature = m.feature(${python(feature.source)}, ${feature.index})`,
      `print(m.features(${python(text)}, ${python(feature.source)}, index=${feature.index})[0])`,
      `print(m.steer(${python(text)}, feature @ ${strength}, max_new_tokens=24))`,
    ].join("\n"),
  };
  if (serves("chat_completions")) {
    ways.OpenAI = [
      "import os",
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url=${python(`${root()}/v1`)}, api_key=os.environ.get("SECRET", "none"))`,
      "answer = client.chat.completions.create(",
      `    model=${python(served().model)},`,
      `    messages=[{"role": "user", "content": ${python(text)}}],`,
      "    max_tokens=24,",
      `    extra_body={"features": ${python(steered.features)}},`,
      ")",
      "print(answer.choices[0].message.content)",
    ].join("\n");
  }
  return ways;
}

let boxes = 0;

/** The ways as tabs, each with a button that copies it. */
export function copyAs(feature, text, strength) {
  const ways = Object.entries(ofFeature(feature, text, strength));
  const id = `ways-${(boxes += 1)}`;
  const said = h("span", { class: "hint", role: "status" });
  const panel = h("pre", { id, tabindex: "0", role: "tabpanel" });
  const tabs = ways.map(([name, code]) => h("button", { type: "button", role: "tab", "aria-controls": id, on: { click: () => choose(name, code) } }, name));
  const choose = (name, code) => {
    panel.textContent = code;
    panel.setAttribute("aria-label", `As ${name}`);
    for (const tab of tabs) {
      const isChosen = tab.textContent === name;
      tab.setAttribute("aria-selected", isChosen ? "true" : "false");
      tab.tabIndex = isChosen ? 0 : -1;
    }
    said.textContent = "";
  };
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    next.click();
    next.focus();
  };
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(panel.textContent);
      said.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(panel); // no clipboard without TLS
      said.textContent = "Selected: copy it with the keyboard.";
    }
  };
  choose(...ways[0]);
  return h("div", { class: "ways" },
    h("div", { class: "row" },
      h("div", { role: "tablist", "aria-label": "Copy as", on: { keydown: move } }, tabs),
      h("button", { type: "button", class: "quiet", on: { click: copy } }, "Copy"), said),
    panel);
}
