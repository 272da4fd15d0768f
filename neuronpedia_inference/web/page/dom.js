// Elements. Text goes in as text always: nothing that a model or a file says becomes HTML.

/**
 * h("p", { class: "x", on: { click } }, "text", element, null): attributes by name; `on` listeners; `set` properties.
 * An attribute that is false, null or undefined is left out, and one that is true is there without a value.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "set") Object.assign(element, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** A number for people: three figures, no exponent for what is near one. */
export function figure(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace("-", "−");
  if (value === 0) return "0";
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toFixed(digits).replace("-", "−");
}

/** How often a feature fires, as people say it. */
export function often(density) {
  if (density == null) return null;
  if (density === 0) return "on no token";
  return density >= 0.1 ? `on ${Math.round(100 * density)} % of tokens` : `on 1 in ${Math.round(1 / density)} tokens`;
}

let fields = 0;

/** A label with its control, and the place where a refusal of it is told. `name` is the request's field. */
export function field(label, control, name, hint) {
  const id = control.id || `field-${(fields += 1)}`;
  control.id = id;
  const problem = h("p", { class: "problem", id: `${id}-problem`, hidden: true });
  control.setAttribute("aria-describedby", problem.id);
  const box = h("div", { class: "field" }, h("label", { for: id }, label), control, hint && h("p", { class: "hint" }, hint), problem);
  if (name) box.dataset.field = name;
  return box;
}
