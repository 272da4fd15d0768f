"""Rules that end a text: against what `watch` says of the same text without them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from served import SOURCE

PROMPT = "The most important thing is"
FEATURE = f"{SOURCE}/1113"
STEER: dict[str, Any] = {
    "prompt": PROMPT,
    "features": [{"source": SOURCE, "index": 1113, "strength": 70}],
    "max_new_tokens": 12,
    "watch": [{"source": SOURCE, "index": 1113}, {"source": SOURCE, "index": 42}],
}
N_PROMPT = 6
"""Tokens, with the one that begins a text."""


def answer(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/steer", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def free(http: httpx.Client) -> dict[str, Any]:
    """The same without rules."""
    return answer(http, **STEER)


def before(text: dict[str, Any]) -> list[float]:
    """The feature at the generated tokens, before it is steered."""
    entry = text["watch"]["values"][0]
    return (entry["before"] or entry["after"])[N_PROMPT:]


def stop(**condition: Any) -> list[dict[str, Any]]:
    return [{"when": condition, "do": "stop"}]


def test_a_text_ends_at_the_first_token_where_the_feature_fires(http: httpx.Client, free: dict[str, Any]) -> None:
    """Steered, the model writes of the economy; unsteered, nothing ever fires, and the text goes on to its end."""
    values = before(free["steered"])
    first = next(place for place, value in enumerate(values) if value > 10)
    assert 0 < first < len(values) - 1
    ruled = answer(http, **STEER, rules=stop(feature=FEATURE, above=10))
    text = ruled["steered"]
    assert text["finish_reason"] == "stop_rule"
    assert text["tokens"] == free["steered"]["tokens"][: first + 1]
    assert text["text"] == "".join(text["tokens"])
    assert text["stopped_by"] == {"rule": 0, "position": first, "token": text["tokens"][-1]}
    assert len(text["watch"]["tokens"]) == N_PROMPT + first + 1
    assert before(text) == pytest.approx(values[: first + 1], rel=1e-3, abs=1e-3)
    assert len(text["watch"]["values"]) == 2
    assert max(before(free["default"])) < 10
    assert ruled["default"]["tokens"] == free["default"]["tokens"]
    assert (ruled["default"]["finish_reason"], ruled["default"]["stopped_by"]) == ("length", None)


def retry(threshold: float = 10, **more: Any) -> list[dict[str, Any]]:
    return [{"when": {"feature": FEATURE, "above": threshold}, "do": "retry", **more}]


def events_of(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", "/v1/steer", json={**body, "stream": True}) as streamed:
        return [json.loads(line[6:])["steered"] for line in streamed.iter_lines() if line.startswith("data: ")]


def test_tokens_are_taken_back_and_others_drawn(http: httpx.Client, free: dict[str, Any]) -> None:
    """Without the rule the feature fires; with it, at no token that is kept."""
    values = before(free["steered"])
    first = next(place for place, value in enumerate(values) if value > 10)
    back, most = 2, first + 3
    body = {**STEER, "rules": retry(back=back, times=16), "n_logprobs": 2, "max_new_tokens": most}
    both = answer(http, **body)
    text = both["steered"]
    assert text["finish_reason"] == "length"
    assert text["events"][0] == {"rule": 0, "position": max(0, first + 1 - back), "n_refused": min(back, first + 1)}
    assert text["tokens"][: text["events"][0]["position"]] == free["steered"]["tokens"][: text["events"][0]["position"]]
    assert text["text"] == "".join(text["tokens"])
    assert len(text["tokens"]) == len(text["logprobs"]) == most
    assert max(before(text)) <= 10
    assert len(before(text)) == len(text["tokens"])
    assert [one["token"] for one in text["logprobs"]] == text["tokens"]
    assert both["default"]["events"] == []
    assert both["default"]["tokens"] == free["default"]["tokens"][:most]
    cumulative = events_of(http, {**body, "compare": False})
    deltas = events_of(http, {**body, "compare": False, "deltas": True})
    for n, event in enumerate(cumulative):
        assert event["tokens"] == text["tokens"][: len(event["tokens"])], f"{n}: a refused token got out"
        assert event["events"] == text["events"][: len(event["events"])]
    assert [token for event in deltas for token in event["tokens"]] == text["tokens"]
    assert [one for event in deltas for one in event["events"]] == text["events"]
    assert "".join(event["text"] for event in deltas) == text["text"]


def test_a_text_that_is_refused_too_often_ends_before_it(http: httpx.Client, free: dict[str, Any]) -> None:
    body = {**STEER, "compare": False, "rules": retry(threshold=-1, back=2, times=3)}
    text = answer(http, **body)["steered"]
    assert (text["tokens"], text["text"], text["finish_reason"]) == ([], "", "retry_exhausted")
    assert text["events"] == [{"rule": 0, "position": 0, "n_refused": 1}] * 4
    assert text["stopped_by"] is None
    assert len(text["watch"]["tokens"]) == N_PROMPT
    assert events_of(http, body)[-1] == text
    later = {**STEER, "compare": False, "rules": retry(back=1, times=1)}
    cut = answer(http, **later)["steered"]
    assert cut["finish_reason"] == "retry_exhausted"
    assert len(cut["tokens"]) == cut["events"][-1]["position"] > 0
    assert events_of(http, later)[-1] == cut


def test_streams_end_there_too_and_never_show_another_token(http: httpx.Client, free: dict[str, Any]) -> None:
    rules = stop(feature=FEATURE, above=10)
    whole = answer(http, **STEER, rules=rules)
    for deltas in (False, True):
        body = {**STEER, "rules": rules, "stream": True, "deltas": deltas}
        with http.stream("POST", "/v1/steer", json=body) as streamed:
            events = [json.loads(line[6:]) for line in streamed.iter_lines() if line.startswith("data: ")]
        assert events[-1]["steered"]["finish_reason"] == "stop_rule"
        assert events[-1]["steered"]["stopped_by"] == whole["steered"]["stopped_by"]
        shown = [event["steered"]["tokens"] for event in events]
        told = [token for tokens in shown for token in tokens] if deltas else shown[-1]
        assert told == whole["steered"]["tokens"]
        for event in events if not deltas else ():
            # A token is told with what was read at it, and not before.
            assert len(event["steered"]["watch"]["tokens"]) == N_PROMPT + len(event["steered"]["tokens"])


@pytest.mark.parametrize(
    ("condition", "n_tokens"),
    [
        ({"feature": FEATURE, "above": 1e6}, None),
        ({"feature": FEATURE, "below": 0.5}, 1),
        ({"not": {"feature": FEATURE, "above": 0.5}}, 1),
        ({"all": [{"feature": FEATURE, "above": 10}, {"feature": FEATURE, "below": 0.5}]}, None),
        ({"any": [{"feature": FEATURE, "above": 1e6}, {"feature": FEATURE, "below": 0.5}]}, 1),
    ],
)
def test_conditions_are_put_together(
    http: httpx.Client, free: dict[str, Any], condition: dict[str, Any], n_tokens: int | None
) -> None:
    text = answer(http, **STEER, compare=False, rules=stop(**condition))["steered"]
    assert len(text["tokens"]) == (n_tokens or len(free["steered"]["tokens"]))
    assert text["finish_reason"] == ("length" if n_tokens is None else "stop_rule")


def test_what_lasts_still_holds_at_the_tokens_that_follow(http: httpx.Client, free: dict[str, Any]) -> None:
    """The feature fires, and then another condition comes true: together only because the first one lasts."""
    values = before(free["steered"])
    first = next(place for place, value in enumerate(values) if value > 10)
    then = next(place for place, value in enumerate(values) if place > first and value < 0.5)
    for lasting, ends in ((then - first, False), (then - first + 1, True), ("from_then_on", True)):
        both = [{"feature": FEATURE, "above": 10, "for": lasting}, {"feature": FEATURE, "below": 0.5}]
        text = answer(http, **STEER, compare=False, rules=stop(all=both))["steered"]
        assert (len(text["tokens"]) == then + 1 and text["finish_reason"] == "stop_rule") is ends, lasting


def test_rules_need_no_watch(http: httpx.Client, free: dict[str, Any]) -> None:
    body = {**STEER, "watch": None, "compare": False}
    text = answer(http, **body, rules=[*stop(feature=FEATURE, above=1e6), *stop(feature=FEATURE, above=10)])["steered"]
    assert text["watch"] is None
    assert text["stopped_by"]["rule"] == 1
    assert text["tokens"] == free["steered"]["tokens"][: len(text["tokens"])]


def test_the_last_token_may_be_the_one(http: httpx.Client, free: dict[str, Any]) -> None:
    first = next(place for place, value in enumerate(before(free["steered"])) if value > 10)
    body = {**STEER, "max_new_tokens": first + 1, "compare": False}
    assert answer(http, **body, rules=stop(feature=FEATURE, above=10))["steered"]["finish_reason"] == "stop_rule"
    assert answer(http, **body)["steered"]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("rules", "status", "says"),
    [
        (stop(feature="15-res-5k/1", above=1), 400, "Did you mean '15-res-4k'"),
        (stop(feature=f"{SOURCE}/99999", above=1), 400, "out of range"),
        (stop(feature="nothing", above=1), 400, "rules.0.when"),
        (stop(feature=FEATURE), 422, "exactly one of above and below"),
        ([{"when": {"feature": FEATURE, "above": 1}, "do": "again"}], 422, "rules.0.do"),
        ([{"when": {"feature": FEATURE, "above": 1}, "do": "stop", "back": 2}], 422, "back of a rule go with do retry"),
        (retry(back=65), 422, "less than or equal to 64"),
        (retry(times=17), 422, "less than or equal to 16"),
        (retry(back=64, times=16) * 2, 400, "up to 2048 tokens are taken back"),
        ([{"do": "stop"}], 422, "rules.0.when"),
        (stop(feature=FEATURE, above=1) * 17, 400, "16"),
    ],
)
def test_what_is_no_rule_is_refused(http: httpx.Client, rules: Any, status: int, says: str) -> None:
    response = http.post("/v1/steer", json={**STEER, "rules": rules})
    assert response.status_code == status, response.text
    assert says in response.json()["error"]
