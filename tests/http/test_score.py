"""Log-probabilities of continuations over a real port, against plain Hugging Face and what generation reports."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronpedia_inference import embedded
from neuronpedia_inference.embedded.weights import model_folder

BOS = "<|im_start|>"
PROMPT = "The most important thing is"
CONTINUATIONS = [" the economy, and what it needs.", " love.", " the country's industry"]
SOURCE, INDEX, LAYER = "15-res-4k", 1113, 15
HOOK = "blocks.15.hook_resid_post"
CHAT = [{"role": "user", "content": "Name a city."}]
FEATURE = f"{SOURCE}/{INDEX}"
ABSOLUTE = 2e-4
"""Of a log-probability: two float32 passes through 30 layers that add in another order, as measured on these texts."""


@pytest.fixture(scope="module")
def net() -> Any:
    """Hugging Face's own model."""
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder())


def plain_logprobs(net: Any, ids: Sequence[int], n_given: int, added: Tensor | None = None) -> Tensor:
    """[pos]: of the ids behind the given ones; `added` to what the block of the feature gives, everywhere."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        if added is None:
            return None
        return out + added if isinstance(out, Tensor) else (out[0] + added, *out[1:])

    handle = net.model.layers[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        logprobs = net(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
    handle.remove()
    return torch.stack([logprobs[place - 1, ids[place]] for place in range(n_given, len(ids))])


def decoder_row() -> Tensor:
    """At unit length, as sources are folded."""
    with safe_open(embedded.sae_dir(SOURCE) / "sae_weights.safetensors", framework="pt") as weights:
        row = weights.get_slice("W_dec")[INDEX].float()
    return row / row.norm()


def scored(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    answer = http.post("/v1/score", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def close(found: Sequence[float], expected: Sequence[float] | Tensor) -> bool:
    return torch.allclose(torch.tensor(list(found)), torch.as_tensor(expected), rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize("strength", [0, 60])
def test_scores_are_those_of_hugging_face(http: httpx.Client, net: Any, tokenizer: Any, strength: float) -> None:
    """Of continuations of several lengths in one pass, with a vector added by hand and without."""
    features = [{"source": SOURCE, "index": INDEX, "strength": strength}] if strength else []
    results = scored(http, prompt=PROMPT, continuations=CONTINUATIONS, features=features, n_logprobs=3)
    given = tokenizer(BOS + PROMPT)["input_ids"]
    added = strength * decoder_row()
    for text, result in zip(CONTINUATIONS, results, strict=True):
        ids = tokenizer(BOS + PROMPT + text)["input_ids"]
        assert (result["token_ids"], result["begins_at"]) == (ids[len(given) :], len(given))
        assert "".join(result["tokens"]) == text
        expected = plain_logprobs(net, ids, len(given), added)
        assert close(result["logprobs"], expected)
        assert close([result["logprob"]], [float(expected.sum())])
        assert close([result["logprob_per_token"]], [float(expected.mean())])
        other = plain_logprobs(net, ids, len(given), None if strength else 60 * decoder_row())
        assert not close(result["logprobs"], other)  # the control: with the edit where there is none, and without it
        for own, top in zip(result["logprobs"], result["likeliest"], strict=True):
            assert len(top) == 3
            assert own <= top[0]["logprob"] + ABSOLUTE
        assert result["is_greedy"] == all(
            own >= top[0]["logprob"] for own, top in zip(result["logprobs"], result["likeliest"], strict=True)
        )


EDITS: list[list[dict[str, Any]]] = [
    [],
    [{"do": "add", "feature": FEATURE, "amount": 60, "on": {"phase": "generated"}}],
    [{"do": "clamp", "feature": FEATURE, "amount": 40, "on": {"from": 1, "to": 4}}],
    [
        {
            "do": "add",
            "feature": "20-res-4k/686",
            "amount": 90,
            "when": {"not": {"feature": FEATURE, "above": 8, "for": 3}},
        }
    ],
]


@pytest.mark.parametrize("prompt", [PROMPT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("edits", EDITS, ids=["plain", "generated", "window", "condition"])
def test_what_was_written_scores_as_it_was_drawn(
    http: httpx.Client, tokenizer: Any, edits: list[dict[str, Any]], prompt: Any
) -> None:
    """The tokens of a continuation are generated ones to what selects and waits."""
    body = {"prompt": prompt, "max_new_tokens": 8, "n_logprobs": 1, "edits": edits, "compare": False}
    drawn = http.post("/v1/steer", json=body).json()["steered"]
    ids = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(token))[0] for token in drawn["tokens"]]
    [result] = scored(http, prompt=prompt, continuations=[ids], edits=edits)
    assert result["tokens"] == drawn["tokens"]
    assert close(result["logprobs"], [one["logprob"] for one in drawn["logprobs"]])
    assert result["is_greedy"]
    if edits:
        [plain] = scored(http, prompt=prompt, continuations=[ids])
        assert not close(plain["logprobs"], result["logprobs"])


def test_continuations_score_alone_as_beside_others_and_other_requests(http: httpx.Client) -> None:
    def body(strength: float, texts: list[str]) -> dict[str, Any]:
        edit = {"do": "add", "feature": FEATURE, "amount": strength, "on": {"phase": "generated"}}
        return {"prompt": PROMPT, "continuations": texts, "edits": [edit]}

    alone = [scored(http, **body(strength, [text]))[0] for strength in (20, 60) for text in CONTINUATIONS]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda strength: scored(http, **body(strength, CONTINUATIONS)), (20, 60, 20, 60)))
    for place, one in enumerate(alone):
        for found in together[place // 3 :: 2]:
            assert close(found[place % 3]["logprobs"], one["logprobs"])
    assert not close(alone[0]["logprobs"], alone[3]["logprobs"])


def test_the_seam_is_where_the_texts_tokens_part(http: httpx.Client, net: Any, tokenizer: Any) -> None:
    """A blank at the end of the prompt, or half a word, belongs to the token that continues it, and to the score."""
    for prompt, rest in (("The capital of France is ", "Paris."), ("They built a hou", "se."), (PROMPT, " love.")):
        ids = tokenizer(BOS + prompt + rest)["input_ids"]
        n_given = len(tokenizer(BOS + prompt.rstrip(" ").removesuffix(" hou"))["input_ids"])
        [result] = scored(http, prompt=prompt, continuations=[rest])
        assert (result["token_ids"], result["begins_at"]) == (ids[n_given:], n_given)
        assert close(result["logprobs"], plain_logprobs(net, ids, n_given))
        [by_ids] = scored(http, prompt=ids[:n_given], continuations=[ids[n_given:]])
        assert by_ids == result
    [by_ids] = scored(http, prompt=tokenizer(BOS + PROMPT)["input_ids"], continuations=[" love."])
    assert by_ids == result


LATE = {
    "do": "add",
    "feature": "10-res-4k/1608",
    "amount": 40,
    "when": {"feature": FEATURE, "below": 1, "for": "from_then_on"},
}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"continuations": []}, 422, "continuations: List should have at least 1 item"),
        ({"continuations": [" a", ""]}, 400, "continuations.1: is empty, so there is nothing to score. Leave it out."),
        ({"prompt": [], "continuations": [" a"]}, 400, "prompt: has no tokens, so there is nothing to go on from."),
        ({"continuations": [" a"] * 65}, 400, "continuations: 65 items are too many, the most is 64. Send fewer."),
        ({"continuations": [[10**9]]}, 400, "The model has no embedding for token"),
        ({"continuations": [" a"], "steer_special_tokens": True}, 400, "steer_special_tokens: goes with a chat."),
        (
            {"continuations": [" a b"], "edits": [{"do": "add", "feature": FEATURE, "amount": 1, "on": {"from": 99}}]},
            400,
            "edits.0.on: selects none of the 6 positions of the prompt and the 1 after it.",
        ),
        ({"continuations": [" a"], "edits": [LATE]}, 400, "edits.0.when: 'blocks.15.hook_resid_post' is reached after"),
        ({"continuations": [" a"], "features": [{"source": SOURCE, "index": 9999, "strength": 1}]}, 400, "features.0:"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(
    http: httpx.Client, body: dict[str, Any], status: int, says: str
) -> None:
    answer = http.post("/v1/score", json={"prompt": PROMPT, **body})
    assert (answer.status_code, says in answer.json()["error"]) == (status, True), answer.text


def test_a_capture_refuses_an_edit_that_would_wait_for_generation(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "points": [HOOK], "edits": [LATE]}
    answer = http.post("/v1/capture", json=body)
    assert (answer.status_code, "this text passes whole" in answer.json()["error"]) == (400, True), answer.text
    steered = http.post("/v1/steer", json={"prompt": PROMPT, "max_new_tokens": 2, "edits": [LATE]})
    assert steered.status_code == 200


def test_states_are_captured_behind_the_edits_of_their_place(http: httpx.Client, net: Any, tokenizer: Any) -> None:
    """At the place of an addition, before it and behind it, and where another edit leaves position 0 out."""
    row, ids = decoder_row(), tokenizer(BOS + PROMPT)["input_ids"]
    seen: dict[int, Tensor] = {}

    def hook(layer: int, added: Tensor | None) -> Any:
        def change(_: Any, __: Any, out: Any) -> Any:
            hidden = out if isinstance(out, Tensor) else out[0]
            changed = hidden if added is None else hidden + added
            seen[layer] = changed[0].clone()
            return changed if isinstance(out, Tensor) else (changed, *out[1:])

        return change

    points = [f"blocks.{layer}.hook_resid_post" for layer in (14, 15, 20)]
    edit = {"do": "add", "feature": FEATURE, "amount": 60}
    body = {"prompt": PROMPT, "points": points}
    plain = http.post("/v1/capture", json=body).json()["results"][0]["states"]
    for more, at in (({}, range(len(ids))), ({"on": {"except": {"positions": [0]}}}, range(1, len(ids)))):
        added = torch.zeros(len(ids), len(row))
        added[list(at)] = 60 * row
        layers = net.model.layers
        handles = [layers[n].register_forward_hook(hook(n, added if n == LAYER else None)) for n in (14, 15, 20)]
        with torch.no_grad():
            net(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        [result] = http.post("/v1/capture", json={**body, "edits": [{**edit, **more}]}).json()["results"]
        for point, layer in zip(points, (14, 15, 20), strict=True):
            found = torch.tensor(result["states"][point])
            assert torch.allclose(found, seen[layer], rtol=0, atol=1e-4 * float(seen[layer].abs().max()))
            assert torch.allclose(found[1:], torch.tensor(plain[point])[1:], atol=1e-3) == (layer == 14)
