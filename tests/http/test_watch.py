"""What `watch` reads while a text is generated against what the activation routes say of the finished text."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from served import BOS, SOURCE

from neuronpedia_inference import embedded

PROMPT = "The most important thing is"
HOOK = "blocks.15.hook_resid_post"
EARLIER = next(name for name in embedded.SOURCES if name != SOURCE)
STEER = {
    "prompt": PROMPT,
    "features": [{"source": SOURCE, "index": 1113, "strength": 70}],
    "max_new_tokens": 12,
}
WATCH = [
    {"source": SOURCE, "index": 1113},
    {"source": SOURCE, "top_k": 5},
    {"source": SOURCE, "index": 42},
    {"source": "7", "index": 3},
]
# Every number is the same float32 sum over the width in another order, once behind cached keys; its terms are as large
# as the largest activation of the text.
ROUNDING = 1e-4


def answer(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def watched(http: httpx.Client) -> dict[str, Any]:
    return answer(http, "/v1/steer", **STEER, watch=WATCH)


def close(found: list[float], expected: list[float]) -> bool:
    return found == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING * max(map(abs, expected)))


def test_what_is_watched_is_what_the_finished_text_has(http: httpx.Client, watched: dict[str, Any]) -> None:
    plain = watched["default"]
    text, tokens = BOS + PROMPT + plain["text"], plain["watch"]["tokens"]
    for entry in plain["watch"]["values"]:
        asked = entry["watch"]
        assert entry["before"] is None
        if "top_k" in asked:
            found = answer(http, "/v1/top-k", prompt=text, source=asked["source"], top_k=5)["results"][0]
            expected = [
                [(f["feature_index"], f["activation_value"]) for f in p["top_features"]] for p in found["positions"]
            ]
            told = [[(f["index"], f["value"]) for f in features] for features in entry["after"]]
            assert len(expected) >= len(tokens) - 1
            for mine, theirs in zip(told[1:], expected[1 - len(tokens) :], strict=True):
                assert [value for _, value in mine] == pytest.approx([v for _, v in theirs], rel=ROUNDING)
                assert {index for index, _ in mine[:3]} <= {index for index, _ in theirs}
            continue
        result = answer(http, "/v1/activations", prompt=text, **asked)["results"][0]
        assert result["tokens"][1 - len(tokens) :] == tokens[1:]
        assert close(entry["after"][1:], result["features"][0]["values"][1 - len(tokens) :]), asked


def test_all_tokens_have_a_value(watched: dict[str, Any]) -> None:
    for text in (watched["steered"], watched["default"]):
        tokens = text["watch"]["tokens"]
        assert "".join(text["tokens"]) == text["text"]
        assert tokens[-len(text["tokens"]) :] == text["tokens"]
        assert "".join(tokens).removeprefix("<|im_start|>") == PROMPT + text["text"]
        assert [entry["watch"] for entry in text["watch"]["values"]] == WATCH
        assert all(len(entry["after"]) == len(tokens) for entry in text["watch"]["values"])


def test_features_are_named(watched: dict[str, Any]) -> None:
    labels = embedded.labels(SOURCE)
    top = watched["default"]["watch"]["values"][1]["after"]
    assert all(one["label"] == (labels[one["index"]] or None) for features in top for one in features)
    assert any(one["label"] for features in top for one in features)


def test_watching_changes_no_token(http: httpx.Client, watched: dict[str, Any]) -> None:
    unwatched = answer(http, "/v1/steer", **STEER)
    for side in ("steered", "default"):
        assert unwatched[side]["tokens"] == watched[side]["tokens"]
        assert unwatched[side]["watch"] is None
    assert watched["steered"]["text"] != watched["default"]["text"]


def test_a_steered_place_is_read_before_and_after(watched: dict[str, Any]) -> None:
    """The feature's encoder sees what its decoder row adds; neurons of an earlier layer do not."""
    feature, _, _, neuron = watched["steered"]["watch"]["values"]
    assert neuron["before"] is None
    assert len(feature["before"]) == len(feature["after"])
    assert feature["before"][0] != feature["after"][0] or feature["before"][1] != feature["after"][1]
    grown = [after - before for before, after in zip(feature["before"][1:], feature["after"][1:], strict=True)]
    assert min(grown) > 10


def test_vectors_add_up(http: httpx.Client) -> None:
    """What steering adds is the difference of what was there before and after."""
    vector = [0.0] * 576
    vector[7] = 1.0
    body = {"prompt": PROMPT, "vectors": [{"hook": HOOK, "vector": vector, "strength": 3.0}], "max_new_tokens": 2}
    [entry] = answer(http, "/v1/steer", **body, watch=[{"hook": HOOK}])["steered"]["watch"]["values"]
    for before, after in zip(entry["before"], entry["after"], strict=True):
        # float32 rounds a sum to one part in 2²⁴ of its larger term.
        assert after[7] - before[7] == pytest.approx(3.0, abs=abs(before[7]) * 2**-22 + 1e-6)
        assert before[:7] + before[8:] == after[:7] + after[8:]


def test_the_lens_behind_the_last_block_says_what_is_written(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "features": [], "compare": False, "max_new_tokens": 6, "n_logprobs": 2}
    text = answer(http, "/v1/steer", **body, watch=[{"lens": "LOGIT_LENS", "layers": [10, 29], "top_n": 2}])["steered"]
    [entry] = text["watch"]["values"]
    assert entry["watch"] == {"lens": "LOGIT_LENS", "layers": [10, 29], "top_n": 2}
    assert all([one["layer"] for one in token] == [10, 29] for token in entry["after"])
    last = [token[1]["top"] for token in entry["after"]][-1 - len(text["tokens"]) : -1]
    for read, reported in zip(last, text["logprobs"], strict=True):
        assert read[0]["token"] == reported["token"]
        told = [one["logprob"] for one in reported["top_logprobs"]]
        assert [one["logprob"] for one in read] == pytest.approx(told, abs=1e-3)
    assert any(token[0]["top"][0] != token[1]["top"][0] for token in entry["after"])


def test_chats_are_watched(http: httpx.Client) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    text = answer(http, "/v1/steer", prompt=chat, features=[], max_new_tokens=3, compare=False, watch=WATCH[:1])[
        "steered"
    ]
    tokens = text["watch"]["tokens"]
    assert tokens[0] == "<|im_start|>"
    assert "Hi" in tokens
    assert len(text["watch"]["values"][0]["after"]) == len(tokens)


def events(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    with http.stream("POST", "/v1/steer", json={**body, "stream": True}) as streamed:
        return [json.loads(line.removeprefix("data: ")) for line in streamed.iter_lines() if line.startswith("data: ")]


def test_streams_tell_the_same(http: httpx.Client, watched: dict[str, Any]) -> None:
    cumulative = events(http, **STEER, watch=WATCH)
    deltas = events(http, **STEER, watch=WATCH, deltas=True)
    assert len(cumulative) > 2
    for side in ("steered", "default"):
        whole = watched[side]["watch"]
        for event in cumulative:
            told = event[side]["watch"]
            assert told["tokens"] == whole["tokens"][: len(told["tokens"])]
            assert all(len(entry["after"]) == len(told["tokens"]) for entry in told["values"])
        assert cumulative[-1][side]["watch"]["tokens"] == whole["tokens"]
        assert [token for event in deltas for token in event[side]["watch"]["tokens"]] == whole["tokens"]
        assert [token for event in deltas for token in event[side]["tokens"]] == watched[side]["tokens"]
        for n, entry in enumerate(whole["values"]):
            if "top_k" in entry["watch"]:
                continue
            for name in ("before", "after"):
                if entry[name] is None:
                    assert all(event[side]["watch"]["values"][n][name] is None for event in (*cumulative, *deltas))
                    continue
                joined = [value for event in deltas for value in event[side]["watch"]["values"][n][name]]
                assert close(joined, entry[name])
                assert close(cumulative[-1][side]["watch"]["values"][n][name], entry[name])


@pytest.mark.parametrize(
    ("watch", "says"),
    [
        ({"source": "15-res-5k", "index": 1}, "Did you mean '15-res-4k'"),
        ({"source": SOURCE, "index": 99999}, "out of range"),
        ({"source": SOURCE, "index": -1}, "out of range"),
        ({"source": SOURCE, "top_k": 10**6}, "the most is 256"),
        ({"source": SOURCE}, "watch.0: give exactly one of index, top_k"),
        ({"source": SOURCE, "index": 1, "top_k": 2}, "exactly one"),
        ({}, "exactly one"),
        ({"index": None}, "exactly one"),
        ({"index": 1}, "watch.0.source: name one"),
        ({"source": SOURCE, "hook": HOOK}, "watch.0: source does not go with hook"),
        ({"source": SOURCE, "index": 1, "layers": [1]}, "watch.0: layers does not go with index"),
        ({"lens": "LOGIT_LENS", "layers": []}, "name at least one of 0 to 29"),
        ({"lens": "LOGIT_LENS", "layers": [1, 30]}, "30 is none of this lens's"),
        ({"lens": "LOGIT_LENS", "top_n": 257}, "the most is 256"),
        ({"hook": "blocks.99.hook_resid_post"}, "layers 0 to 29"),
        ({"hook": "blocks.3.hook_resid_pst"}, "Unknown hook"),
        ({"hook": "blocks.3.attn.hook_v"}, "cannot be watched"),
        ({"hook": "blocks.3.attn.hook_pattern"}, "Unknown hook"),
    ],
)
def test_what_cannot_be_watched_is_refused_by_name(http: httpx.Client, watch: dict[str, Any], says: str) -> None:
    for stream in (False, True):
        response = http.post("/v1/steer", json={**STEER, "watch": [watch], "stream": stream})
        assert response.status_code == 400, response.text
        assert says in response.json()["error"]


@pytest.mark.parametrize(
    ("watch", "says"),
    [
        ([{"source": SOURCE, "indx": 1}], "Did you mean 'index'"),
        ([{"source": SOURCE, "top_k": 0}], "watch.0.object.top_k: Input should be greater than or equal to 1"),
        ([{"lens": "JACOBIAN"}], "LOGIT_LENS"),
        ({"source": SOURCE, "index": 1}, "watch"),
    ],
)
def test_what_is_no_watch_is_refused(http: httpx.Client, watch: Any, says: str) -> None:
    response = http.post("/v1/steer", json={**STEER, "watch": watch})
    assert response.status_code == 422
    assert says in response.json()["error"]


def test_watches_have_bounds(http: httpx.Client) -> None:
    many = http.post("/v1/steer", json={**STEER, "watch": [WATCH[0]] * 65})
    assert (many.status_code, "65" in many.json()["error"], "64" in many.json()["error"]) == (400, True, True)
