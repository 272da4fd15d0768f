// The examples of the reference name the built-in model and all that can be asked. Where a server holds another model they
// are told in its names, and those that ask for what it has not are left out.

const BUILT_IN = {
  layers: 30,
  model: "smollm2-135m-instruct",
  sources: ["10-res-4k", "15-res-4k", "20-res-4k"],
  set: "res-4k",
  width: 576,
};
const HOOK = /^blocks\.(\d+)\.(.+)$/;

const LAYERS = new Set(["layer", "layers", "steer_layers"]);

const NEEDS = { JACOBIAN_LENS: "lens_jacobian", role: "chat_completions" };

/** The document with the examples that the server which `capabilities` describes can answer, in its names. */
export function inNamesOf(capabilities, document) {
  const { model, sources = [], sae_sets: sets = [] } = capabilities;
  const isBuiltIn = model === BUILT_IN.model && BUILT_IN.sources.every((one) => sources.includes(one));
  const names = new Map([[BUILT_IN.model, model]]);
  if (sets.length) names.set(BUILT_IN.set, sets[0]);
  if (sources.length) {
    BUILT_IN.sources.forEach((name, place) => names.set(name, sources[Math.floor((place * sources.length) / 3)]));
  }
  const told = structuredClone(document);
  for (const path of Object.values(told.paths)) {
    for (const operation of Object.values(path)) {
      for (const media of Object.values(operation.requestBody?.content ?? {})) {
        for (const [name, example] of Object.entries(media.examples ?? {})) {
          if (asksForMore(operation, example.value, capabilities)) delete media.examples[name];
          else if (!isBuiltIn) example.value = renamed(example.value, names, capabilities);
        }
      }
      if (isBuiltIn) continue;
      for (const parameter of operation.parameters ?? []) {
        if ("example" in parameter) parameter.example = renamed(parameter.example, names, capabilities);
      }
    }
  }
  return told;
}

function asksForMore({ operationId }, value, { endpoints }) {
  if (endpoints[operationId] === false) return true;
  const said = JSON.stringify(value);
  return Object.entries(NEEDS).some(([word, endpoint]) => said.includes(`"${word}"`) && !endpoints[endpoint]);
}

function renamed(value, names, about) {
  if (Array.isArray(value)) {
    const isVector = value.length === BUILT_IN.width && value.every((one) => typeof one === "number");
    return isVector ? Array(about.d_model).fill(value[0]) : value.map((one) => renamed(one, names, about));
  }
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, one]) =>
      [key, LAYERS.has(key) ? layersOf(one, about) : renamed(one, names, about)]));
  }
  if (typeof value !== "string") return value;
  const hook = HOOK.exec(value);
  if (hook) return `blocks.${layersOf(Number(hook[1]), about)}.${hook[2]}`;
  const [source, ...index] = value.split("/");
  return index.length && names.has(source) ? [names.get(source), ...index].join("/") : names.get(value) ?? value;
}

/** As far up in the other model as they are in the built-in one; each once. */
function layersOf(layers, about) {
  const inOther = (layer) => Math.floor((layer * about.num_layers) / BUILT_IN.layers);
  return Array.isArray(layers) ? [...new Set(layers.map(inOther))] : inOther(layers);
}
