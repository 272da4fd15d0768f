import { inNamesOf } from "./served.js";

const answer = await fetch("openapi.json");
const root = new URL(".", location.href).href.replace(/\/$/, "");
const reference = { ...(await answer.json()), servers: [{ url: root }] };
let key = null;

const night = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", night.matches);
night.addEventListener("change", follow);
follow();

const ui = SwaggerUIBundle({
  spec: reference,
  domNode: document.getElementById("reference"),
  persistAuthorization: false,
  queryConfigEnabled: false,
  validatorUrl: null,
  docExpansion: "list",
  defaultModelsExpandDepth: -1,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  syntaxHighlight: { activated: false },
  plugins: [plainPaths],
  requestInterceptor: noteKey,
  onComplete: tellInServedNames,
});

/** Paths without a link inside their button, which no keyboard and no screen reader could tell apart. */
function plainPaths(system) {
  return { components: { DeepLink: ({ text }) => system.React.createElement("span", null, text) } };
}

// What Swagger UI leaves without a name, and what scrolls but takes no focus.
const UNNAMED = {
  "textarea.body-param__text": "Request body",
  ".examples-select select": "Example",
  ".response-control-media-type select": "Media type of the answer",
  ".body-param-content-type select": "Media type of the request",
  ".parameters-col_description input": "Value",
};

new MutationObserver(() => {
  for (const [selector, name] of Object.entries(UNNAMED)) {
    for (const element of document.querySelectorAll(`${selector}:not([aria-label])`)) element.setAttribute("aria-label", name);
  }
  for (const element of document.querySelectorAll("pre:not([tabindex])")) element.tabIndex = 0;
}).observe(document.getElementById("reference"), { childList: true, subtree: true });

/** Once a request has gone out with a key, the server can be asked what it serves. */
function noteKey(request) {
  const given = request.headers?.["X-SECRET-KEY"] ?? request.headers?.Authorization?.replace(/^Bearer /i, "");
  if (given && given !== key) {
    key = given;
    tellInServedNames();
  }
  return request;
}

async function tellInServedNames() {
  const about = await fetch("v1/capabilities", { headers: key ? { "X-SECRET-KEY": key } : {} });
  if (!about.ok) return;
  ui.specActions.updateJsonSpec(inNamesOf(await about.json(), reference));
}
