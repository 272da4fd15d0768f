// The server's key: in this module's memory, and nowhere else.

let key = "";

export function setKey(given) {
  key = given;
}

export function hasKey() {
  return key !== "";
}

export function headers() {
  return key ? { "X-SECRET-KEY": key } : {};
}
