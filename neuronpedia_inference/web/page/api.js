// Requests, and how they are refused.

import { askForKey, waitOut } from "./gate.js";
import { hasKey, headers } from "./key.js";

/** What the server has refused, or that it could not be reached (status 0). */
export class Refused extends Error {
  constructor(status, body, retryAfter) {
    super(body.error);
    this.status = status;
    this.code = body.code;
    this.detail = body.detail ?? [];
    this.requestId = body.request_id;
    this.retryAfter = retryAfter;
  }

  /** Field of the request that it is about, such as "prompt" or "features.0.strength"; null if it names none. */
  get field() {
    if (this.detail.length) return this.detail[0].loc.slice(1).join(".");
    const named = /^([a-z_]+(?:\.[a-z0-9_]+)*): /.exec(this.message)?.[1];
    return named ?? UNNAMED.find(([start]) => this.message.startsWith(start))?.[1] ?? null;
  }

  get said() {
    return this.detail.length ? this.detail.map((one) => one.msg).join("; ") : this.message;
  }
}

/** Refusals that begin with no field's name, and what they are about. */
const UNNAMED = [["Text too long", "prompt"], ["No room to generate", "max_new_tokens"]];
const UNREACHABLE = "The server cannot be reached. Is it running, and is the network there?";
const CUT_OFF = "The connection ended before the answer did. What has come so far stays.";

/**
 * The answer to a request, which waits for a key where one is asked for, and as long as the server says where it is
 * full or loading. `body` makes it a POST. Throws Refused; an AbortError once `signal` says so.
 */
export async function send(path, { body, signal } = {}) {
  for (;;) {
    const answer = await once(path, body, signal);
    if (answer.ok) return answer;
    const refused = await refusalOf(answer);
    if (refused.status === 401) await askForKey(hasKey(), signal);
    else if (refused.status === 503) await waitOut(refused, signal);
    else throw refused;
  }
}

export async function ask(path, options) {
  return (await send(path, options)).json();
}

async function once(path, body, signal) {
  const said = { headers: headers(), signal, cache: "no-store" };
  if (body) {
    said.method = "POST";
    said.headers["Content-Type"] = "application/json";
    said.body = JSON.stringify(body);
  }
  try {
    return await fetch(path, said);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(0, { error: UNREACHABLE, code: "unreachable" });
  }
}

async function refusalOf(answer) {
  const after = Number(answer.headers.get("Retry-After")) || 5;
  try {
    return new Refused(answer.status, await answer.json(), after);
  } catch {
    return new Refused(answer.status, { error: `The server answered with status ${answer.status}.`, code: "unknown" }, after);
  }
}

/** The events of a stream, one JSON value each. Throws Refused also where the stream ends in an error or is cut off. */
export async function* events(path, body, signal) {
  const answer = await send(path, { body, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Refused(0, { error: CUT_OFF, code: "cut_off" });
    });
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) yield eventOf(part);
  }
}

function eventOf(text) {
  const value = JSON.parse(text.slice(text.indexOf("data: ") + 6));
  if (value.error !== undefined) throw new Refused(500, value);
  return value;
}
