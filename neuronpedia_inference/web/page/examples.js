// What the page opens with. The built-in model has examples of its own; others have what can be asked of any.

import { served } from "./server.js";

const BUILT_IN = {
  model: "smollm2-135m-instruct",
  source: "15-res-4k",
  text: "The economy of the island depends on fishing, tourism and the export of copper.",
  feature: "15-res-4k/1113",
  steer: { prompt: "The most important thing is", f: ["15-res-4k/1113@70"], watch: "15-res-4k/1113" },
  lens: "The capital of France is",
  tries: [
    { words: "Turn “economy” up while the model writes", view: "steer", values: { prompt: "The most important thing is", f: "15-res-4k/1113@70", watch: "15-res-4k/1113", go: "1" } },
    { words: "See what it makes of the moon landing", view: "explore", values: { text: "Armstrong stepped onto the Moon and the whole world watched.", source: "15-res-4k" } },
    { words: "Talk to it while the economy is on its mind", view: "chat", values: { f: "15-res-4k/1113@45", say: "What should I do this weekend?" } },
  ],
};
const ANY = {
  text: "The judge told the court that the army had burned the old church.",
  steer: { prompt: "The most important thing is", f: [], watch: null },
  lens: "The capital of France is",
};

export function examples() {
  const { model, sources } = served();
  if (model === BUILT_IN.model && sources.includes(BUILT_IN.source)) return BUILT_IN;
  const source = sources[Math.floor(sources.length / 2)];
  return {
    ...ANY,
    source,
    tries: [
      { words: "See what another text has in it", view: "explore", values: { text: "Armstrong stepped onto the Moon and the whole world watched.", source } },
      { words: "Write with a feature turned up", view: "steer", values: { prompt: ANY.steer.prompt } },
      { words: "Put what is strongest first", view: "explore", values: { text: ANY.text, source, rank: "activation" } },
    ],
  };
}
