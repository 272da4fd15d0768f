"""Many strengths at once over a real port: what each would have said by itself, and which of them is best."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import SOON_S, Serve, Wrapped, small_settings

from neuronpedia_inference.costs import Demand
from neuronpedia_inference.runtime import Runtime

PROMPT = "The most important thing is"
ECONOMY, MOON = (("15-res-4k", 1113), ("10-res-4k", 1608))
BODY: dict[str, Any] = {
    "prompt": [PROMPT, "I think that"],
    "features": [{"source": source, "index": index} for source, index in (ECONOMY, MOON)],
    "strengths": [40, 70],
    "seeds": [1, 2],
    "temperature": 0.7,
    "max_new_tokens": 4,
}
SAME: dict[str, Any] = {**BODY, "watch": [{"source": "15-res-4k", "index": 1113}], "reproducible": True}
"""Its texts are the same to the letter however they are asked for."""


def swept(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/sweep", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def found(http: httpx.Client) -> dict[str, Any]:
    return swept(http, **SAME)


def test_a_cell_is_what_steering_by_itself_says(http: httpx.Client, found: dict[str, Any]) -> None:
    assert [(one["prompt"], one["steering"], one["strength"], one["seed"]) for one in found["cells"]] == [
        (prompt, steering, strength, seed)
        for prompt in (0, 1)
        for steering in (0, 1)
        for strength in (40, 70)
        for seed in (1, 2)
    ]
    assert [(one["prompt"], one["seed"]) for one in found["default"]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    takes = found["takes"]
    assert (takes["n_cells"], takes["n_plain"], takes["n_new_tokens"]) == (16, 4, 80)
    assert takes["n_generations"] == 2
    plain = {(one["prompt"], one["seed"]): one for one in found["default"]}
    for cell in found["cells"][1::3]:
        feature = {**BODY["features"][cell["steering"]], "strength": cell["strength"]}
        body = {"prompt": BODY["prompt"][cell["prompt"]], "features": [feature], "seed": cell["seed"], "judge": True}
        asked = {**{key: SAME[key] for key in ("temperature", "max_new_tokens", "watch", "reproducible")}, **body}
        alone = http.post("/v1/steer", json=asked).json()
        for one, other in ((cell, alone["steered"]), (plain[cell["prompt"], cell["seed"]], alone["default"])):
            assert (one["text"], one["tokens"], one["finish_reason"]) == (
                other["text"],
                other["tokens"],
                other["finish_reason"],
            )
            assert one["judge"]["logprob_per_token"] == pytest.approx(other["judge"]["logprob_per_token"], abs=2e-4)
            assert one["judge"]["repetition"] == other["judge"]["repetition"]
            assert one["judge"]["dose"] == pytest.approx(other["judge"]["dose"], rel=1e-3)
            for mine, theirs in zip(one["watch"]["values"], other["watch"]["values"], strict=True):
                assert mine["after"] == pytest.approx(theirs["after"], rel=1e-3, abs=1e-2)
        assert cell["text"] != plain[cell["prompt"], cell["seed"]]["text"]  # the control: steered


GENERATED = {"do": "clamp", "feature": "15-res-4k/1113", "amount": 1, "on": {"phase": "generated"}}
LONG = "The most important thing for a country is what its people make of the hours of their days, and that"


def test_a_cell_s_receipt_and_edits_are_those_of_steering_by_itself(http: httpx.Client) -> None:
    """Where it leaves the prompt alone, whose numbers are read once for all cells, and where it does not."""
    everywhere = {**GENERATED, "on": {"phase": "both", "from": 2}}
    asked = {"prompt": LONG, "max_new_tokens": 4, "watch": ["edits", {"source": "15-res-4k", "index": 1113}]}
    told = swept(http, **asked, edits=[GENERATED, everywhere], strengths=[40, 60], seeds=[3], receipt=True)
    cells, receipt = told["cells"], told["receipt"]
    assert [one["edits"] for one in receipt["cells"] if one["steering"] is None] == [[]]
    assert [one["tokens"] for one in receipt["prompts"]] == [told["cells"][0]["watch"]["tokens"][:-4]]
    for cell, kept in zip(cells, (one for one in receipt["cells"] if one["steering"] is not None), strict=True):
        edit = [GENERATED, everywhere][cell["steering"]]
        steered = {"edits": [{**edit, "amount": cell["strength"]}], "seed": 3, "receipt": True, "compare": False}
        alone = http.post("/v1/steer", json={**asked, **steered}).json()
        assert kept["text"] == alone["receipt"]["steered"]
        [proof], [expected] = kept["edits"], alone["receipt"]["edits"]
        assert (proof["field"], proof["amount"], proof["acted"]) == (
            f"edits.{cell['steering']}",
            cell["strength"],
            True,
        )
        for moment in ("first", "last"):
            for name, value in expected[moment].items():
                close = pytest.approx(value, rel=1e-3, abs=1e-2) if isinstance(value, float) else value
                assert proof[moment][name] == close
        for mine, theirs in zip(cell["watch"]["values"], alone["steered"]["watch"]["values"], strict=True):
            for one, other in zip(mine.get("edits") or [mine], theirs.get("edits") or [theirs], strict=True):
                for name in ("share", "before", "target", "after", "dose"):
                    expect_close(one.get(name), other.get(name))
    assert receipt["request"]["strengths"] == [40, 60]
    assert "seed" not in receipt["sampling"]


def expect_close(some: list[float | None] | None, others: list[float | None] | None) -> None:
    """null where null; sums over 576 numbers of another order."""
    assert (some is None) == (others is None)
    for one, other in zip(some or (), others or (), strict=True):
        assert one == (None if other is None else pytest.approx(other, rel=1e-3, abs=1e-2))


def test_one_prompt_is_run_for_all_cells(http: httpx.Client, runtime: Runtime) -> None:
    """Of two generations the second finds it known, and of judged and watched cells too."""
    body = {"prompt": LONG, "edits": [GENERATED], "max_new_tokens": 2, "strengths": list(range(1, 21))}
    for watch, n_later in ((None, 1), ([{"source": "15-res-4k", "index": 1113}, "edits"], 1)):
        asyncio.run(runtime.forget())
        before = n_prefilled(http)
        told = swept(http, **body, watch=watch, receipt=True)
        n_prompt = len(told["receipt"]["prompts"][0]["tokens"])
        assert told["takes"]["n_generations"] == 2
        assert told["takes"]["n_prompt_tokens"] == 2 * n_prompt, "at the most: once for each generation"
        assert n_prefilled(http) - before == n_prompt + n_later
    everywhere = swept(http, **{**body, "edits": [{**GENERATED, "on": None}]}, dry_run=True)["takes"]
    assert everywhere["n_prompt_tokens"] == 21 * n_prompt, "each strength makes another of it"


def n_prefilled(http: httpx.Client) -> int:
    [line] = [
        line
        for line in http.get("/metrics").text.splitlines()
        if "tokens_total{" in line and 'pass="prefill"' in line and "padding" not in line
    ]
    return int(float(line.split()[-1]))


def test_what_is_kept_until_the_answer_is_whole_is_admitted(
    http: httpx.Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the first generation: 512 bytes of each new token and 96 of each watched number."""
    body = {**BODY, "max_new_tokens": 4, "watch": [{"source": "15-res-4k", "index": 1113}]}
    takes = swept(http, **body, dry_run=True)["takes"]
    kept = 512 * takes["n_new_tokens"] + 96 * takes["n_watched"]
    seen: list[int] = []
    permit = runtime._admission.permit

    def counted(demand: Demand, *others: Any) -> Any:
        seen.append(demand.bytes)
        return permit(demand, *others)

    monkeypatch.setattr(runtime._admission, "permit", counted)
    assert takes["n_watched"] > 0
    swept(http, **body)
    assert seen[0] == kept
    assert runtime._admission.inside.bytes < kept or runtime._admission.inside.requests == 0
    monkeypatch.setattr(runtime._admission, "bounds", replace(runtime._admission.bounds, bytes=kept - 1))
    answer = http.post("/v1/sweep", json=body)
    assert (answer.status_code, "MiB of memory" in answer.json()["error"]) == (400, True)


def test_an_effect_is_how_much_of_the_feature_is_in_the_text(http: httpx.Client, found: dict[str, Any]) -> None:
    """By the unsteered model, over the generated tokens but the last."""
    looked_at = max(found["cells"], key=lambda one: one["effects"][0])
    assert looked_at["effects"][0] > 1
    text = BODY["prompt"][looked_at["prompt"]] + looked_at["text"]
    body = {"prompt": text, **BODY["features"][looked_at["steering"]]}
    [result] = http.post("/v1/activations", json=body).json()["results"]
    n = len(looked_at["tokens"])
    assert result["tokens"][-n:] == looked_at["tokens"]
    values = result["features"][0]["values"][-n:-1]
    assert looked_at["effects"] == [pytest.approx(sum(values) / len(values), rel=1e-3)]
    assert len(found["default"][0]["effects"]) == 2


def test_a_stream_says_what_it_takes_then_cell_by_cell_the_same(http: httpx.Client, found: dict[str, Any]) -> None:
    body = {**SAME, "prompt": BODY["prompt"][0], "seeds": [1]}
    with http.stream("POST", "/v1/sweep", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    first, *told, last = [json.loads(line) for line in lines]
    assert (first["takes"]["n_cells"], first["cells"], first["suggested"]) == (4, [], None)
    assert all(len(event["cells"]) + len(event["default"]) == 1 for event in told)
    for name in ("cells", "default"):
        texts = [one["text"] for event in told for one in event[name]]
        assert texts == [one["text"] for one in found[name] if (one["prompt"], one["seed"]) == (0, 1)]
    assert last["suggested"] == swept(http, **body)["suggested"]
    nothing = {"cells": [], "default": [], "suggested": None, "receipt": None}
    assert swept(http, **body, dry_run=True) == {"takes": first["takes"], **nothing}


def test_edits_and_steerings_are_multiplied(http: httpx.Client) -> None:
    """An amount of 2 at strength 20 is one of 40; an edit without an amount stays as it is beside others."""
    clamp = {"do": "clamp", "feature": "15-res-4k/1113", "amount": 2, "on": {"phase": "generated"}}
    ablate = {"do": "ablate", "feature": "20-res-4k/686"}
    short = {"prompt": PROMPT, "max_new_tokens": 8, "reproducible": True}
    by_edit = swept(http, **short, edits=[clamp], strengths=[20, 40])["cells"]
    steering = {"edits": [clamp, ablate], "features": [{"source": "15-res-4k", "index": 1113, "strength": 0.5}]}
    by_steering = swept(http, **short, steerings=[steering], strengths=[40], judge=False)
    expected = [
        {"edits": [{**clamp, "amount": 40}]},
        {"edits": [{**clamp, "amount": 80}]},
        {
            "edits": [{**clamp, "amount": 80}, ablate],
            "features": [{"source": "15-res-4k", "index": 1113, "strength": 20}],
        },
    ]
    texts = [http.post("/v1/steer", json={**short, **one}).json()["steered"]["text"] for one in expected]
    assert [one["text"] for one in (*by_edit, *by_steering["cells"])] == texts
    assert len(set(texts)) == 3
    assert (by_steering["suggested"], by_steering["cells"][0]["judge"]) == (None, None)


def windows() -> dict[tuple[str, int], tuple[float, float]]:
    """Strengths between which texts were found usable by reading them, from the page on steering."""
    page = (Path(__file__).parents[2] / "docs" / "steering.md").read_text(encoding="utf-8")
    table = page.partition("<!-- windows:start -->")[2].partition("<!-- windows:end -->")[0]
    rows = re.findall(r"^\| `([^/]+)/(\d+)` \| (\d+) \| (\d+) \|", table, re.MULTILINE)
    return {(source, int(index)): (float(low), float(high)) for source, index, low, high in rows}


@pytest.mark.long
def test_what_is_suggested_lies_in_the_window_found_by_reading(http: httpx.Client) -> None:
    found = windows()
    assert len(found) == 8
    features = [{"source": source, "index": index} for source, index in found]
    strengths = [20, 35, 50, 60, 70, 80, 95, 110, 130, 160, 200]
    body = {"prompt": [PROMPT, "Yesterday I"], "strengths": strengths, "max_new_tokens": 24}
    for feature, (low, high) in zip(features, found.values(), strict=True):
        suggested = swept(http, **body, features=[feature])["suggested"]
        [strength] = suggested["strengths"]
        assert strength is not None, (feature, suggested)
        assert low <= strength <= high, (feature, suggested)
        for mean in suggested["means"]:
            within = mean["lost"] <= suggested["most_lost"] and mean["repeated"] <= suggested["most_repeated"]
            assert mean["holds"] == within
        assert strengths[0] < low
        assert high < strengths[-1], "the control: some strengths are too weak, and some too strong"


def test_others_have_their_turns_between_two_generations(serve: Serve, runtime: Runtime) -> None:
    """A short request comes out while a sweep of many generations goes on."""
    settings = small_settings(max_rows=2)
    few = Wrapped(runtime, settings=settings)
    served = serve(settings, lambda: few)
    one = {"prompt": PROMPT, "features": BODY["features"][:1], "strengths": [20, 40, 60, 80, 90]}
    body = {**one, "max_new_tokens": 16, "judge": False, "stream": True}
    ended: list[str] = []
    begun = threading.Event()

    def sweep() -> None:
        with served.client() as client, client.stream("POST", "/v1/sweep", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    begun.set()
        ended.append("sweep")

    thread = threading.Thread(target=sweep)
    thread.start()
    assert begun.wait(SOON_S)
    with served.client() as client:
        answer = client.post("/v1/steer", json={"prompt": PROMPT, "max_new_tokens": 2, "compare": False})
        ended.append("short")
    thread.join(SOON_S)
    assert answer.status_code == 200
    assert ended == ["short", "sweep"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_sweep_waits_for_nothing_that_it_holds_itself(
    http: httpx.Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Two of them would wait for each other."""
    monkeypatch.setattr(runtime._admission, "bounds", replace(runtime._admission.bounds, requests=1))
    answer = http.post("/v1/sweep", json={**BODY, "max_new_tokens": 2, "stream": stream})
    assert answer.status_code == 200
    assert answer.text.count('"logprob_per_token"') == 20
    assert "error" not in answer.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strengths": []}, "strengths: is empty, so there is nothing to sweep. Give 1 to 64."),
        ({"seeds": []}, "seeds: is empty, so there is nothing to sweep. Give 1 to 64."),
        ({"features": []}, "give exactly one of features, edits, steerings, with at least one item"),
        ({"edits": [{"do": "ablate", "feature": "15-res-4k/1"}]}, "give exactly one of features, edits, steerings"),
        (
            {"features": None, "edits": [{"do": "ablate", "feature": "15-res-4k/1"}]},
            "edits.0: has no strength and no amount that strengths could multiply",
        ),
        ({"features": None, "steerings": [{}]}, "steerings.0: has no strength and no amount"),
        ({"prompt": []}, "prompt: needs at least one text"),
        ({"prompt": ["a"] * 17}, "prompt: 17 texts are too many, the most is 16."),
        (
            {"strengths": list(range(64))},
            "2 prompts × 2 features × 64 strengths × 2 seeds are 516 texts with the unsteered ones, the most is 256.",
        ),
        ({"strengths": [1] * 65}, "strengths: 65 items are too many, the most is 64."),
        ({"features": [{"source": "15-res-4k", "index": 4096}]}, "features.0: Feature index 4096 is out of range"),
        (
            {"max_new_tokens": 1639},
            "max_new_tokens: 20 texts of 1639 are 32780 new tokens, the most of one sweep is 32768. Sweep less at "
            "once, ask for shorter texts, or raise MAX_SWEEP_TOKENS.",
        ),
        ({"strengths": [1], "seeds": [1], "max_new_tokens": 4096}, "No room to generate"),
        (
            {"watch": [{"hook": "blocks.15.hook_resid_post"}], "max_new_tokens": 20},
            "watch: the texts of this sweep have up to",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused_with_the_bound(http: httpx.Client, change: dict[str, Any], says: str) -> None:
    for stream in (False, True):
        answer = http.post("/v1/sweep", json={**BODY, **change, "stream": stream})
        assert (answer.status_code, says in answer.json()["error"]) == (400, True), answer.text
