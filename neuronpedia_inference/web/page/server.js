// What this server says of itself, and the few requests that several views make.

import { ask } from "./api.js";

let capabilities = null;

export async function meet() {
  capabilities = await ask("v1/capabilities");
  return capabilities;
}

export function served() {
  return capabilities;
}

export function serves(operation) {
  return capabilities?.endpoints[operation] === true;
}

export function nameOf({ source, index }) {
  return `${source}/${index}`;
}

/** "15-res-4k/1113" → { source, index }; null if it is no feature's name. */
export function featureOf(name) {
  const [, source, index] = /^(.+)\/(\d+)$/.exec(name.trim()) ?? [];
  return source ? { source, index: Number(index) } : null;
}

export function card({ source, index }, signal) {
  return ask(`v1/features/${encodeURIComponent(source)}/${index}?limit=8`, { signal });
}

export async function search(words, signal) {
  const query = new URLSearchParams({ q: words, limit: "12" });
  return (await ask(`v1/features?${query}`, { signal })).features;
}
