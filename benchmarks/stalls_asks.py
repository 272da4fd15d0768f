"""The largest legal requests, one of each kind, and large bodies that have to be refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import httpx

from benchmarks.cases import D_MODEL
from benchmarks.wire import MODEL, SOURCE_SET

SOURCE, NEURONS, WIDTH = f"15-{SOURCE_SET}", "15", 4096
WORDS = ("the", "cat", "house", "river", "army", "court", "judge", "water", "church", "road")
"""Each a token of its own."""
N_STEERS, MOST_STEERS, MOST_RESULTS, SORT_ENTRIES = 178_000, 512, 1000, 60_000
N_LAYERS, N_CONTRASTED, N_EDITS = 30, 128, 64
BODY_BYTES = 8 * 2**20
Body = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    name: str
    path: str
    body: bytes = b""
    """Empty: a GET."""


@dataclass(frozen=True)
class Bounds:
    """What a server allows, as it says of itself; where it does not, what it allowed before it had that bound."""

    n_tokens: int
    top_k: int
    sort_entries: int

    @classmethod
    def of(cls, url: str) -> Bounds:
        with httpx.Client(base_url=url, timeout=60) as http:
            told = http.get("/v1/capabilities").json()
            schema = http.get("/openapi.json").json()["components"]["schemas"]["ActivationAllRequest"]
        listed = schema["properties"]["sort_by_token_indexes"].get("maxItems", SORT_ENTRIES)
        return cls(told["token_limit"], told.get("max_top_k", WIDTH), listed)


def text(n_tokens: int) -> str:
    """So many tokens, the beginning of the sequence included."""
    return " ".join(WORDS[n % len(WORDS)] for n in range(n_tokens - 1))


def asks(bounds: Bounds, n_new: int) -> Iterator[Ask]:
    """n_new: tokens of the steers with log-probabilities."""
    prompt = text(bounds.n_tokens)
    every: Body = {
        "prompt": prompt,
        "model": MODEL,
        "source_set": SOURCE_SET,
        "selected_sources": [],
        "sort_by_token_indexes": [],
        "ignore_bos": True,
        "num_results": MOST_RESULTS,
    }
    by_indexes = {**every, "sort_by_token_indexes": [n % bounds.n_tokens for n in range(bounds.sort_entries)]}
    by_token = {"prompt": prompt, "source": SOURCE, "top_k": bounds.top_k}
    on_wire = {"model": MODEL, "ignore_bos": False}
    logprobs = {**_completion(n_new), "n_logprobs": 10}
    yield _ask("topk-by-token", "/v1/activation/topk-by-token", {**by_token, **on_wire})
    yield _ask("top-k", "/v1/top-k", by_token)
    yield _ask("source, an SAE", "/v1/activation/source", {"prompts": [prompt], "model": MODEL, "source": SOURCE})
    yield _ask("source, neurons", "/v1/activation/source", {"prompts": [prompt], "model": MODEL, "source": NEURONS})
    yield _ask("all, 1000 of 3 SAEs", "/v1/activation/all", every)
    yield _ask("activations, 1000", "/v1/activations", {"prompt": prompt, "num_results": MOST_RESULTS})
    yield _ask(f"all, sorted by {bounds.sort_entries}", "/v1/activation/all", by_indexes)
    yield Ask("tokenize, 8 MB of nested lists", "/v1/tokenize", nested_lists())
    yield Ask(f"steer, {N_STEERS} steers", "/v1/steer", many_steers())
    yield _ask(f"steer, {MOST_STEERS} vectors", "/v1/steer", largest_steer())
    yield _ask(f"steer, {n_new} tokens, whole", "/v1/steer/completion", logprobs)
    yield _ask(f"steer, {n_new} tokens, stream", "/v1/steer/completion", {**logprobs, "stream": True})
    yield from _inside(prompt)
    yield _ask("steer, 64 edits and 64 watches", "/v1/steer", edited_and_watched(bounds.top_k))


def _inside(prompt: str) -> Iterator[Ask]:
    """What passes in the model, sets of texts, and what is known of features."""
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    texts = [f"{n} {text(20)}" for n in range(N_CONTRASTED)]
    messages = [{"role": ("user", "assistant")[n % 2], "content": "Hi"} for n in range(15)]
    yield _ask("capture, every layer, JSON", "/v1/capture", {"prompt": prompt, "points": points})
    tensors = {"prompt": [prompt] * 4, "points": points, "format": "safetensors"}
    yield _ask("capture, every layer of 4 texts, tensors", "/v1/capture", tensors)
    yield _ask(
        "contrast, 64 and 64 texts", "/v1/contrast", {"a": texts[:64], "b": texts[64:], "source_set": SOURCE_SET}
    )
    raw = {"prompts": [prompt], "model": MODEL, "layers": list(range(N_LAYERS))}
    yield _ask("raw, every layer", "/v1/activation/raw", raw)
    yield _ask("attention", "/v1/activation/attention", {"prompt": prompt, "model": MODEL, "layer": 3, "head": 1})
    yield _ask("chat template, 15 messages", "/v1/apply-chat-template", {"messages": messages, "model": MODEL})
    yield Ask("search, the first", f"/v1/features?{urlencode({'q': 'economy moon war river ' * 20, 'limit': 1000})}")
    yield Ask("a feature, everything", f"/v1/features/{SOURCE}/1113")


def small() -> Iterator[tuple[str, bytes]]:
    """Path and body of a small request to every part of the server."""
    yield "/v1/steer", json.dumps({"prompt": "Hi", "features": [], "max_new_tokens": 2}).encode()
    yield "/v1/top-k", json.dumps({"prompt": "Hi", "source": SOURCE, "top_k": 2}).encode()
    yield "/v1/activation/all", everything(4)


def completion(n_new: int, n_logprobs: int, *, stream: bool) -> bytes:
    """Both types, greedy, of any model."""
    return json.dumps({**_completion(n_new), "n_logprobs": n_logprobs, "stream": stream}).encode()


def everything(n_tokens: int) -> bytes:
    """`activation_all` over all SAEs, the ten strongest features."""
    body = {"prompt": text(n_tokens), "model": MODEL, "source_set": SOURCE_SET, "selected_sources": []}
    return json.dumps({**body, "sort_by_token_indexes": [], "ignore_bos": True, "num_results": 10}).encode()


def nested_lists() -> bytes:
    """A valid request beside as many empty lists as a body has room for."""
    head = json.dumps({"model": MODEL, "text": "Hi"}).removesuffix("}").encode()
    n_lists = (BODY_BYTES - len(head) - len(b', "x": []}')) // len(b"[],")
    return head + b', "x": [' + b",".join([b"[]"] * n_lists) + b"]}"


def many_steers() -> bytes:
    one = json.dumps({"source": SOURCE, "index": 1, "strength": 1}, separators=(",", ":"))
    body = f'{{"prompt":"Hi","features":[{",".join([one] * N_STEERS)}]}}'.encode()
    assert len(body) <= BODY_BYTES
    return body


def edited_and_watched(top_k: int) -> Body:
    """Each edit on listed positions and on a condition, each watch of its own features."""
    on = {"positions": list(range(5, 500)), "except": {"token_ids": list(range(500))}}
    edits = [
        {
            "do": "clamp",
            "feature": f"{SOURCE}/{n}",
            "amount": 3,
            "on": on,
            "when": {"feature": f"{SOURCE}/{n}", "above": 1},
        }
        for n in range(N_EDITS)
    ]
    watches: list[Body] = [{"source": SOURCE, "top_k": min(top_k, 200)}]
    watches += [{"source": SOURCE, "index": n} for n in range(N_EDITS - 2)]
    watches += [{"lens": "LOGIT_LENS", "top_n": 10}]
    return {"prompt": text(100), "edits": edits, "watch": watches, "max_new_tokens": 50, "compare": False}


def largest_steer() -> Body:
    rng = random.Random(0)
    hook = "blocks.15.hook_resid_post"
    numbers = [[round(rng.gauss(0, 0.01), 6) for _ in range(D_MODEL)] for _ in range(MOST_STEERS)]
    vectors = [{"hook": hook, "vector": vector, "strength": 0.01} for vector in numbers]
    return {"prompt": "I think that", "vectors": vectors, "max_new_tokens": 8}


def _completion(n_new: int) -> Body:
    return {
        "prompt": "Once upon a time",
        "model": MODEL,
        "steer_method": "SIMPLE_ADDITIVE",
        "normalize_steering": False,
        "types": ["STEERED", "DEFAULT"],
        "features": [],
        "n_completion_tokens": n_new,
        "temperature": 0,
        "strength_multiplier": 1,
        "freq_penalty": 0,
        "seed": 16,
    }


def _ask(name: str, path: str, body: Body) -> Ask:
    return Ask(name, path, json.dumps(body).encode())
