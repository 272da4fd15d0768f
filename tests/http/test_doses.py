"""What is told of edits, and bounds on doses, over a real port."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from served import SOURCE

from tests.http.test_rules import N_PROMPT, PROMPT, answer, events_of

ADD = {"do": "add", "feature": f"{SOURCE}/1113", "amount": 70}
CLAMP = {"do": "clamp", "feature": f"{SOURCE}/1113", "amount": 60, "id": "economy", "on": {"phase": "generated"}}
STEER: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 4, "compare": False}
POST = "blocks.15.hook_resid_post"


def told(text: dict[str, Any], place: int = 0) -> list[dict[str, Any]]:
    return text["watch"]["values"][place]["edits"]


def test_what_edits_find_and_do_is_what_is_read_around_them(http: httpx.Client) -> None:
    """Against the vectors that pass there, which are watched too; the feature is read before and behind both edits."""
    watch = ["edits", {"hook": POST}, {"source": SOURCE, "index": 1113}]
    body = {**STEER, "edits": [CLAMP, ADD], "watch": watch, "compare": True}
    both = answer(http, **body)
    text = both["steered"]
    clamp, add = told(text)
    values = text["watch"]["values"]
    assert values[0]["watch"] == "edits"
    assert (values[0]["before"], values[0]["after"]) == (None, None)
    assert [(one["edit"], one["id"]) for one in (clamp, add)] == [("edits.0", "economy"), ("edits.1", None)]
    n_tokens = len(text["watch"]["tokens"])
    generated = slice(N_PROMPT, n_tokens)
    assert clamp["share"] == [0.0] * N_PROMPT + [1.0] * (n_tokens - N_PROMPT)
    assert clamp["before"][:N_PROMPT] == clamp["dose"][:N_PROMPT] == [None] * N_PROMPT
    assert clamp["target"][generated] == [60.0] * (n_tokens - N_PROMPT)
    assert clamp["before"][generated] == pytest.approx(values[2]["before"][generated], rel=1e-3, abs=1e-3)
    assert clamp["after"][generated] == pytest.approx(values[2]["after"][generated], rel=1e-3, abs=1e-3)
    assert (add["before"], add["target"], add["after"]) == (None, None, None)
    assert add["share"] == [1.0] * n_tokens
    before = np.array(values[1]["before"])
    norms = np.linalg.norm(before, axis=1)
    assert add["dose"] == pytest.approx(list(70 / norms), rel=1e-3)
    set_to = [abs(60 - a) / norm for a, norm in zip(clamp["before"][generated], norms[generated], strict=True)]
    assert clamp["dose"][generated] == pytest.approx(set_to, rel=1e-3)
    assert told(both["default"]) == []
    assert len(both["default"]["watch"]["tokens"]) == n_tokens
    plain = answer(http, **{**body, "watch": None, "compare": False})["steered"]
    assert plain["tokens"] == text["tokens"]
    deltas = events_of(http, {**body, "compare": False, "deltas": True})
    assert [dose for event in deltas for dose in told(event)[1]["dose"]] == pytest.approx(add["dose"], rel=1e-3)
    last = told(events_of(http, {**body, "compare": False})[-1])
    assert last[0]["share"] == clamp["share"]
    assert last[1]["dose"] == pytest.approx(add["dose"], rel=1e-3)


def test_a_dose_that_is_too_large_is_told_or_made_smaller(http: httpx.Client) -> None:
    free = answer(http, **STEER, edits=[ADD], watch=["edits"])["steered"]
    [add] = told(free)
    largest = max(add["dose"])
    warned = answer(http, **STEER, edits=[ADD, CLAMP], max_dose={"value": 0.4})["steered"]
    first = next(one for one in warned["over_dose"] if one["edit"] == "edits.0")
    assert first["dose"] == pytest.approx(largest, rel=1e-3)
    assert add["dose"][first["position"]] == pytest.approx(largest, rel=1e-3)
    assert answer(http, **STEER, edits=[ADD], max_dose={"value": 9})["steered"]["over_dose"] == []
    bound = {"value": 0.25, "then": "clamp"}
    edits = [ADD, {**CLAMP, "amount": 300}]
    clamped = answer(http, **STEER, edits=edits, watch=["edits", {"hook": POST}], max_dose=bound)["steered"]
    doses = np.array([told(clamped)[0]["dose"]])
    norms = np.linalg.norm(np.array(clamped["watch"]["values"][1]["before"]), axis=1)
    np.testing.assert_allclose(doses[0], np.minimum(0.25, 70 / norms), rtol=1e-3)
    assert max(dose for dose in told(clamped)[1]["dose"] if dose is not None) == pytest.approx(0.25, rel=1e-3)
    assert clamped["over_dose"] is None
    assert clamped["tokens"] != free["tokens"]


@pytest.mark.parametrize(
    ("edit", "value", "says"),
    [
        ({"do": "add", "feature": f"{SOURCE}/1113", "amount": 0.6, "unit": "dose"}, 0.5, "may write 0.6 of"),
        ({"do": "add", "feature": f"{SOURCE}/1113", "amount": 0.4, "unit": "dose"}, 0.5, None),
        (ADD, 0.1, "which is typical there, the most is 0.1"),
        (ADD, 2, None),
        ({"do": "ablate", "feature": f"{SOURCE}/1113"}, 0.01, "scale may write"),
        ({"do": "orthogonal", "vector": [1.0] * 576, "hook": POST, "amount": 3}, 1.5, "may write 2 of"),
        ({"do": "project_out", "vector": [1.0] * 576, "hook": POST}, 1, None),
        ({"do": "cap", "vector": [1.0] * 576, "hook": POST, "amount": -1, "unit": "dose"}, 1.5, "may write 2 of"),
    ],
)
def test_a_dose_that_may_become_too_large_is_refused(
    http: httpx.Client, edit: dict[str, Any], value: float, says: str | None
) -> None:
    body = {**STEER, "max_new_tokens": 1, "edits": [edit], "max_dose": {"value": value, "then": "refuse"}}
    response = http.post("/v1/steer", json=body)
    if says is None:
        assert response.status_code == 200, response.text
        return
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]
    assert "edits.0: max_dose" in response.json()["error"]


def test_what_is_not_a_bound_or_a_watch_is_refused(http: httpx.Client) -> None:
    for body, says in (
        ({"max_dose": {"value": 0}}, "greater than 0"),
        ({"max_dose": {"value": 1, "then": "ask"}}, "max_dose.then"),
        ({"watch": ["edit"]}, 'or "edits"'),
    ):
        response = http.post("/v1/steer", json={**STEER, "edits": [ADD], **body})
        assert response.status_code == 422, response.text
        assert says in response.json()["error"]
    warns = {"edits": [ADD], "max_dose": {"value": 1}}
    captured = http.post("/v1/capture", json={"prompt": PROMPT, "points": [POST], **warns})
    assert captured.status_code == 400
    assert "no place for warnings" in captured.json()["error"]


def test_typical_norms_are_told_and_typical(http: httpx.Client) -> None:
    """Within a third of what this prompt has: what probes see is not what people write."""
    norm = http.get("/v1/capabilities").json()["typical_norms"][POST]
    passed = answer(http, **STEER, watch=[{"hook": POST}])["steered"]["watch"]["values"][0]["after"]
    assert norm == pytest.approx(float(np.median(np.linalg.norm(np.array(passed[1:]), axis=1))), rel=1 / 3)
