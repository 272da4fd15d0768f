"""Two receipts held against each other."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from neuronpedia_inference.client.replays import CLOSE, body_of, compared, receipt_in
from neuronpedia_inference.errors import InvalidRequest

MOMENT = {
    **{"position": 3, "token": " a", "before": 1.5, "after": 6.5, "dose": 0.25},
    **{"activation_before": None, "activation_after": None},
}
EDIT = {
    **{"field": "edits.0", "do": "add", "source": "1-res", "index": 4, "to": None, "point": "blocks.1.hook_resid_post"},
    **{"unit": "absolute", "amount": 5.0, "norm": 1.0, "vector_sha256": None, "acted": True},
    **{"first": dict(MOMENT), "last": dict(MOMENT)},
}
TEXT = {"token_ids": [4, 5], "tokens": [" a", " b"], "finish_reason": "length"}
RECEIPT: dict[str, Any] = {
    "format": 1,
    "operation": "steer",
    "versions": {"torch": "2.0"},
    "model": {"name": "m", "status": "known", "files": [], "sha256": "a" * 64},
    "device": "cpu",
    "dtype": "float32",
    "products": {},
    "reproducible": True,
    "request": {"prompt": "x", "stream": True, "deltas": True, "receipt": True},
    "prompt_ids": [1, 2],
    "prompt_tokens": ["<s>", "x"],
    "sampling": {"seed": 16},
    "features": [{"source": "1-res", "index": 4, "norm": 1.0, "sha256": {"decoder_row": "b" * 64}}],
    "sources": [],
    "edits": [EDIT],
    "steered": TEXT,
    "default": None,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    found = deepcopy(RECEIPT)
    *parents, last = path.split(".")
    part: Any = found
    for name in parents:
        part = part[int(name) if isinstance(part, list) else name]
    part[int(last) if isinstance(part, list) else last] = value
    return found


def test_a_receipt_is_the_same_as_itself() -> None:
    replay = compared(RECEIPT, deepcopy(RECEIPT))
    assert (replay.is_same, replay.is_comparable, str(replay)) == (True, True, "no difference")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("prompt_ids.1", 9, "prompt, token 1: 'x' in the receipt, 'x' now"),
        ("features.0.sha256.decoder_row", "c" * 64, "feature 1-res/4, decoder row: bbbbbbbbbbbb… in the receipt, cccc"),
        ("features.0.sha256.bias", "c" * 64, "feature 1-res/4, bias: nothing in the receipt, cccccccccccc… now"),
        ("features", [], "feature 1-res/4, decoder row: bbbbbbbbbbbb… in the receipt, nothing now"),
        (
            "edits.0.amount",
            6.0,
            "edit edits.0 (add 1-res/4 at blocks.1.hook_resid_post), amount: 5.0 in the receipt, 6",
        ),
        ("edits.0.do", "clamp", "edit edits.0 (add 1-res/4 at blocks.1.hook_resid_post): 'there' in the receipt, 'not"),
        ("edits.0.acted", False, "edit edits.0 (add 1-res/4 at blocks.1.hook_resid_post), whether it acted: True in"),
        ("edits.0.last.after", 6.5000001, "blocks.1.hook_resid_post), after at its last token: 6.5 in the receipt"),
        (
            "edits.0.first",
            None,
            "blocks.1.hook_resid_post), position at its first token: 3 in the receipt, nothing now",
        ),
        ("sampling.seed", 3, "sampling, seed: 16 in the receipt, 3 now"),
        ("steered.token_ids", [4], "steered, token 1: ' b' in the receipt, "),
        ("steered.finish_reason", "stop", "steered, why it ended: 'length' in the receipt, 'stop' now"),
        ("default", TEXT, "the default text: 'not there' in the receipt, 'there' now"),
    ],
)
def test_what_differs_is_named(path: str, value: Any, says: str) -> None:
    replay = compared(RECEIPT, changed(path, value))
    assert says in replay.summary
    assert replay.is_comparable
    assert compared(changed(path, value), RECEIPT).differences


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("versions.torch", "2.1", "version of torch: '2.0' in the receipt, '2.1' now"),
        ("model.sha256", "d" * 64, "weights of m: aaaaaaaaaaaa… in the receipt, dddddddddddd… now"),
        ("device", "cuda", "device: 'cpu' in the receipt, 'cuda' now"),
        ("dtype", "bfloat16", "dtype: 'float32' in the receipt"),
        ("products", {"2x2": ["turned"]}, "products: {} in the receipt"),
        ("reproducible", False, "the receipt is not reproducible"),
    ],
)
def test_under_other_circumstances_texts_cannot_be_compared(path: str, value: Any, says: str) -> None:
    now = changed(path, value)
    assert compared(RECEIPT, now).is_same
    [told] = compared(RECEIPT, now).circumstances
    assert says in told
    now["steered"]["token_ids"] = [4, 6]
    assert not compared(RECEIPT, now).is_same
    assert not compared(RECEIPT, now).is_comparable
    now["edits"][0]["amount"] = 7.0
    assert compared(RECEIPT, now).is_comparable, "another strength is no matter of circumstances"


def test_numbers_may_round_otherwise_only_under_other_circumstances() -> None:
    near, far = 6.5 * (1 + CLOSE / 2), 6.5 * (1 + 2 * CLOSE)
    assert not compared(RECEIPT, changed("edits.0.first.after", near)).is_same
    other = changed("device", "cuda")
    other["edits"][0]["first"]["after"] = near
    assert compared(RECEIPT, other).is_same
    other["edits"][0]["first"]["after"] = far
    assert not compared(RECEIPT, other).is_same


def test_digests_that_are_pending_are_not_compared() -> None:
    now = changed("model", {"name": "m", "status": "pending", "files": [], "sha256": None})
    replay = compared(RECEIPT, now)
    assert (replay.is_same, replay.circumstances) == (True, ())
    assert replay.not_compared == ("the model's weights: their digest is pending in what runs now",)


def test_it_is_asked_again_without_streaming() -> None:
    assert body_of(RECEIPT) == {"prompt": "x", "receipt": True, "reproducible": True}
    assert body_of(changed("reproducible", False))["reproducible"] is False


def test_receipts_are_found_in_answers() -> None:
    assert receipt_in(RECEIPT) == receipt_in({"steered": {}, "receipt": RECEIPT}) == RECEIPT
    assert receipt_in({"choices": [], "interpretability": {"receipt": RECEIPT}}) == RECEIPT


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "no receipt"),
        ({}, "no receipt"),
        ({"receipt": None}, "no receipt"),
        ({**RECEIPT, "format": 2}, "has the format 2, and 1 is what is read here"),
        ({**RECEIPT, "operation": "nothing"}, "the operation 'nothing', which is not known here"),
        ({**RECEIPT, "request": 3}, "no receipt"),
    ],
)
def test_what_is_none_is_refused(value: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        receipt_in(value)


def test_a_receipt_that_lacks_a_part_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: KeyError 'versions'"):
        compared({name: part for name, part in RECEIPT.items() if name != "versions"}, RECEIPT)
