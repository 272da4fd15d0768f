// What is looked at, in the address behind the "#", which browsers send to nobody. The key is never there.

const LONGEST = 6000;

/** { view, values }: values are URLSearchParams. */
export function read() {
  const [view, query = ""] = location.hash.slice(1).split("?", 2);
  return { view: decodeURIComponent(view), values: new URLSearchParams(query) };
}

/** values: of names to texts or lists of texts; what is empty is left out. */
export function addressOf(view, values = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    for (const one of [value].flat()) if (one !== "" && one != null) query.append(name, one);
  }
  const said = query.toString();
  return said && said.length <= LONGEST ? `#${view}?${said}` : `#${view}`;
}

export function write(view, values) {
  history.replaceState(null, "", addressOf(view, values));
}
