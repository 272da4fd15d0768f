"""Every error that the contract names in its sections 3.10 and 4.1 to 4.8, a row each: what it calls its target, where
versions differ.

`NAMED` was written down by hand from those sections, clause by clause; the table below has to cover it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from refusing import LENS, busy, no_jacobians
from served import MODEL, SOURCE, TEXT, Serve, Served, Wrapped, running, small_settings
from test_stream import FailingAfter

from neuronpedia_inference.errors import EngineFailed, NotReady
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import architectures, models

assert architectures.CONFIGS, "the families of `TINY` are among them"

NAMED: dict[str, tuple[str, ...]] = {
    "3.10": ("no template",),
    "4.1": ("template failure", "no template", "too long"),
    "4.2": ("layer below", "layer above", "head below", "head above", "linear attention", "no pattern", "too long"),
    "4.3": ("no prompt", "17 prompts", "layers out of range", "hook_point", "type", "too long"),
    "4.4": ("not temporal", "unknown source", "malformed source", "too long"),
    "4.5": (
        *("neither prompt nor chat", "both", "no type", "negative temperature", "negative count", "no tokens"),
        *("too long", "no Jacobian lens", "unknown steer token", "busy", "not finite"),
    ),
    "4.7": ("no new model while it runs",),
    "4.8": ("not loaded", "no persona", "another layer", "no message"),
}
"""Clauses by section. 4.6 names none."""

TINY = {
    "llama": None,
    "qwen3_5": "{% if messages[0].role == 'system' %}{{ raise_exception('No.') }}{% endif %}x",
    "bloom": None,
}
"""Small models by family, with their chat templates."""
LONG = "word " * 200
USER = {"role": "user", "content": "Hi"}
CHAT = {
    "prompt": [USER],
    "model": MODEL,
    "steer_method": "SIMPLE_ADDITIVE",
    "normalize_steering": False,
    "types": ["DEFAULT"],
    "features": [],
    "n_completion_tokens": 1,
    "temperature": 0,
    "strength_multiplier": 1,
    "freq_penalty": 0,
    "seed": 0,
    "steer_special_tokens": False,
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/steer/completion-chat": CHAT,
    "/v1/apply-chat-template": {"messages": [USER]},
    "/v1/activation/attention": {"prompt": TEXT, "model": MODEL, "layer": 1, "head": 0},
    "/v1/activation/raw": {"prompts": [TEXT]},
    "/v1/util/similarity-matrix-pred": {"modelId": MODEL, "sourceId": SOURCE, "index": 0, "text": TEXT},
    "/v1/lens/prompt": LENS,
    "/v1/persona/monitor": {"model": MODEL, "conversation": [USER, {"role": "assistant", "content": "Hello."}]},
}
TEMPLATE, ATTENTION, RAW, SIMILARITY, LENSES, MONITOR = list(BODIES)[1:]


class Here:
    """The servers of this file: the embedded model's, small ones, and others made for the purpose."""

    def __init__(self, server: Served, runtime: Runtime, serve: Serve, tiny: Callable[[str], Served]) -> None:
        self.server, self.runtime, self.serve, self.tiny = server, runtime, serve, tiny

    def asked(self, served: Served, path: str, **changes: Any) -> httpx.Response:
        with served.client() as client:
            return client.post(path, json={**BODIES.get(path, {}), **changes})


Ask = Callable[[Here], httpx.Response]


@dataclass(frozen=True)
class Row:
    """A clause, how it is brought about, and what must come back."""

    section: str
    clause: str
    ask: Ask
    status: int
    code: str
    says: str
    more: dict[str, Any] = field(default_factory=dict)
    """Of the body, beside `error` and `code`."""


def on(path: str, family: str = "", /, **changes: Any) -> Ask:
    """A good body with some fields changed, on the embedded model or a small one."""
    return lambda here: here.asked(here.tiny(family) if family else here.server, path, **changes)


def without_persona(here: Here) -> httpx.Response:
    served = here.serve(small_settings(), lambda: Wrapped(here.runtime, persona=None))
    return here.asked(served, MONITOR)


def while_loading(here: Here) -> httpx.Response:
    def loading() -> Runtime:
        raise NotReady("The model is still loading")

    with here.serve(small_settings(), loading).client() as client:
        assert client.get("/health").status_code == 200, "it lives"
        return client.get("/v1/steer/health")


def not_finite(here: Here) -> httpx.Response:
    failing = FailingAfter(here.runtime, 0, EngineFailed("The model's output is not finite"))
    served = here.serve(small_settings(), lambda: Wrapped(here.runtime, complete=failing))
    return here.asked(served, LENSES, stream=False)


NO_TEMPLATE = (
    "This model has no chat template, so it cannot accept chat messages. "
    "Use /v1/steer/completion with a raw `prompt` instead."
)
NO_LENS = {"status": "unavailable", "detail": "nobody has fitted any"}
BAD, LIMIT, HOOK = (400, "invalid_request"), (400, "limit_exceeded"), (400, "unknown_hook")
UNREAD, SOURCES = (422, "invalid_body"), (400, "unknown_source")
ROWS = [
    # 3.10 Chat rendering and the assistant axis
    Row("3.10", "no template", on("/v1/steer/completion-chat", "llama"), *BAD, NO_TEMPLATE),
    # 4.1 apply-chat-template
    Row(
        "4.1",
        "template failure",
        on(TEMPLATE, "qwen3_5", messages=[{"role": "system", "content": "a"}]),
        *BAD,
        "Failed to apply chat template: ",
    ),
    Row("4.1", "no template", on(TEMPLATE, "llama"), *BAD, f"Failed to apply chat template: {NO_TEMPLATE}"),
    Row(
        "4.1",
        "too long",
        on(TEMPLATE, messages=[{"role": "user", "content": "word " * 60}]),
        *LIMIT,
        "Rendered chat too long: 91 tokens, max is 48",
    ),
    # 4.2 activation/attention
    Row("4.2", "layer below", on(ATTENTION, layer=-1), *BAD, "Invalid layer: -1. Must be in [0, 30)."),
    Row("4.2", "layer above", on(ATTENTION, layer=30), *BAD, "Invalid layer: 30. Must be in [0, 30)."),
    Row("4.2", "head below", on(ATTENTION, head=-1), *BAD, "Invalid head: -1. Must be in [0, 9)."),
    Row("4.2", "head above", on(ATTENTION, head=9), *BAD, "Invalid head: 9. Must be in [0, 9)."),
    Row("4.2", "linear attention", on(ATTENTION, "qwen3_5", layer=0), *HOOK, "blocks.0.attn.hook_pattern"),
    Row("4.2", "no pattern", on(ATTENTION, "bloom"), *HOOK, "this architecture's attention is not read"),
    Row("4.2", "too long", on(ATTENTION, prompt=LONG), *LIMIT, "Text too long: 202 tokens, max is 48"),
    # 4.3 activation/raw
    Row("4.3", "no prompt", on(RAW, prompts=[]), *BAD, "At least one prompt is required"),
    Row("4.3", "17 prompts", on(RAW, prompts=["a"] * 17), *LIMIT, "Batch size 17 exceeds maximum of 16"),
    Row(
        "4.3", "layers out of range", on(RAW, layers=[0, 30, 31]), *BAD, "layers: 30, 31 out of range, the model has 30"
    ),
    Row("4.3", "hook_point", on(RAW, hook_point="mlp_out"), *UNREAD, "hook_point: Input should be 'residual_stream'"),
    Row("4.3", "type", on(RAW, type="every_token"), *UNREAD, "type: Input should be 'final_output_token'"),
    Row("4.3", "too long", on(RAW, prompts=[LONG]), *LIMIT, "Text too long: 202 tokens, max is 48"),
    # 4.4 util/similarity-matrix-pred
    Row("4.4", "not temporal", on(SIMILARITY), *BAD, "SAE architecture is not temporal"),
    Row("4.4", "unknown source", on(SIMILARITY, sourceId="99-res-4k"), *SOURCES, "Unknown source '99-res-4k'"),
    Row("4.4", "malformed source", on(SIMILARITY, sourceId="fake-source"), *SOURCES, "Unknown source 'fake-source'"),
    Row(
        "4.4",
        "too long",
        on(SIMILARITY, "llama", sourceId="1", text=LONG),
        *LIMIT,
        "Text too long: 1000 tokens, max is",
    ),
    # 4.5 lens/prompt
    Row(
        "4.5",
        "neither prompt nor chat",
        on(LENSES, prompt=None),
        *BAD,
        "Exactly one of prompt and chat must be provided",
    ),
    Row("4.5", "both", on(LENSES, chat=[USER]), *BAD, "Exactly one of prompt and chat must be provided"),
    Row("4.5", "no type", on(LENSES, type=[]), *BAD, "type: name at least one of LOGIT_LENS and JACOBIAN_LENS"),
    Row("4.5", "negative temperature", on(LENSES, temperature=-0.1), *BAD, "temperature is -0.1, the least is 0"),
    Row(
        "4.5",
        "negative count",
        on(LENSES, num_completion_tokens=-1),
        *BAD,
        "num_completion_tokens is -1, the least is 0",
    ),
    Row("4.5", "no tokens", on(LENSES, prompt="", prepend_bos=False), *BAD, "The prompt has no tokens"),
    Row(
        "4.5",
        "too long",
        on(LENSES, prompt="word " * 1100),
        *LIMIT,
        "This conversation is too long (1102 tokens). The maximum is 1024 tokens",
    ),
    Row(
        "4.5",
        "no Jacobian lens",
        lambda here: no_jacobians(here.runtime, here.serve),
        400,
        "no_jacobian_lens",
        "Jacobian lens is not available for this model",
        NO_LENS,
    ),
    Row(
        "4.5",
        "unknown steer token",
        on(LENSES, steer_tokens=[{"token": "nosuchtoken", "type": "LOGIT_LENS"}], steer_layers=[3], steer_strength=1),
        *BAD,
        "steer_tokens: 'nosuchtoken' is no token of this model",
    ),
    Row(
        "4.5",
        "busy",
        lambda here: busy(here.runtime, here.serve),
        429,
        "busy",
        "Server is busy with another request",
        {"busy": True},
    ),
    Row("4.5", "not finite", not_finite, 500, "engine_failed", "The model's output is not finite", {"kind": "error"}),
    # 4.7 initialize
    Row("4.7", "no new model while it runs", on("/initialize"), 409, "conflict", "restart it"),
    # 4.8 health, steer/health and persona/monitor
    Row("4.8", "not loaded", while_loading, 503, "not_ready", "The model is still loading"),
    Row("4.8", "no persona", without_persona, *BAD, "No persona axes are served for"),
    Row(
        "4.8",
        "another layer",
        on(MONITOR, layer=40),
        *BAD,
        "layer: the axes of this model were fitted at layer 22, not 40",
    ),
    Row("4.8", "no message", on(MONITOR, conversation=[]), *BAD, "conversation: at least one message is required"),
]


def test_the_table_covers_every_clause_once() -> None:
    assert [(row.section, row.clause) for row in ROWS] == [(s, clause) for s, some in NAMED.items() for clause in some]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Served]]:
    """A small model's server, by its family; each starts when it is first asked for."""
    there: dict[str, Served] = {}

    def started(family: str) -> Served:
        folder = tmp_path_factory.mktemp(family)
        models.model(family).save_pretrained(folder)
        tokenizer = models.tokenizer()
        tokenizer.chat_template = TINY[family]
        tokenizer.save_pretrained(folder)
        settings = Settings.read(model_id=str(folder), sae_sets=(), num_threads=1, token_limit=300, max_tokens=350)
        runtime = Runtime.load(settings)
        stack.callback(runtime.close)
        return stack.enter_context(running(settings, lambda: runtime))

    with ExitStack() as stack:
        yield lambda family: there.get(family) or there.setdefault(family, started(family))


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.section} {row.clause}" for row in ROWS])
def test_a_clause_is_refused_as_the_contract_has_it(
    server: Served, runtime: Runtime, serve: Serve, tiny: Callable[[str], Served], row: Row
) -> None:
    answer = row.ask(Here(server, runtime, serve, tiny))
    body = answer.json()
    assert (answer.status_code, body.get("code")) == (row.status, row.code), body
    assert row.says in body["error"]
    assert body.items() >= row.more.items()
    for inside in ("Traceback", "Error(", "/neuronpedia_inference"):
        assert inside not in answer.text


@pytest.mark.parametrize("path", [path for path in BODIES if path != SIMILARITY])  # test_temporal.py has an SAE for it
def test_the_bodies_are_fine_as_they_are(server: Served, path: str) -> None:
    with server.client() as client:
        answer = client.post(path, json=BODIES[path])
    assert answer.status_code == 200, answer.text
