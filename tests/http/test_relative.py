"""Features ranked against their own maximum and density, over a real port."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import httpx
import pytest
from served import SOURCE, TEXT

from neuronpedia_inference import embedded

SENTENCES = (
    "The bank raised interest rates again this spring.",
    "Her grandmother baked bread with rye and honey.",
    "The comet will pass the sun in early March.",
    "He scored twice in the last ten minutes of the match.",
    "Add two eggs and whisk until the batter is smooth.",
    "The senate voted against the new immigration law.",
    "A violin and a cello played the slow movement.",
    "def area(radius): return 3.14 * radius ** 2",
    "The patient was given antibiotics for the infection.",
    "Sheep graze on the hills above the village.",
    "The emperor divided his land between two sons.",
    "Mix the acid slowly into the water, never the other way.",
    "Our flight to Lisbon was delayed by fog.",
    "The novel ends with a wedding that nobody expected.",
    "Click the button to download the file to your computer.",
    "Rain fell for nine days and the river burst its banks.",
    "Most of the island's people are Catholic.",
    "The detective found a glove beside the broken window.",
    "Bees dance to tell each other where flowers are.",
    "Could you tell me how to get to the station?",
)


def strongest(http: httpx.Client, prompt: str, **fields: Any) -> list[dict[str, Any]]:
    answer = http.post("/v1/activations", json={"prompt": prompt, "source_set": "res-4k", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"][0]["features"]


def relative(feature: dict[str, Any]) -> float:
    """By hand, from the annotations."""
    known = embedded.source_annotations(feature["source"])
    density, most = float(known.density[feature["index"]]), float(known.maximum[feature["index"]])
    return 0.0 if density == 0 else -math.log10(density) * feature["max_value"] / most


def test_the_ranking_is_the_documented_one(http: httpx.Client) -> None:
    """Against all features, fetched by activation and ranked by hand."""
    every = strongest(http, TEXT, source=SOURCE, num_results=50)
    ranked = strongest(http, TEXT, source=SOURCE, num_results=50, rank_by="relative")
    assert [one["relative"] for one in ranked] == pytest.approx([relative(one) for one in ranked], rel=1e-5)
    assert [one["relative"] for one in ranked] == sorted((one["relative"] for one in ranked), reverse=True)
    least = ranked[-1]["relative"]
    assert {one["index"] for one in every if relative(one) > least * (1 + 1e-5)} <= {one["index"] for one in ranked}
    assert all(one["relative"] is None for one in every)
    by_index = {one["index"]: one for one in every}
    shared = [one for one in ranked if one["index"] in by_index]
    assert shared
    assert all(one["values"] == by_index[one["index"]]["values"] for one in shared), "only the order is another"


def at_each_token(http: httpx.Client, k: int, **fields: Any) -> list[list[dict[str, Any]]]:
    answer = http.post("/v1/top-k", json={"prompt": TEXT, "source": SOURCE, "top_k": k, **fields})
    assert answer.status_code == 200, answer.text
    return [position["top_features"] for position in answer.json()["results"][0]["positions"]][1:]


def test_at_a_token_what_is_peculiar_to_it_comes_first(http: httpx.Client) -> None:
    """Against many features of each token, fetched by activation and ranked by hand."""
    every = at_each_token(http, 256)
    ranked = at_each_token(http, 3, rank_by="relative")
    for most, first in zip(every, ranked, strict=True):
        by_hand = {
            one["feature_index"]: relative({**one, "source": SOURCE, "index": one["feature_index"], "max_value": value})
            for one in most
            for value in [one["activation_value"]]
        }
        best = sorted(by_hand.values(), reverse=True)[:3]
        assert [one["relative"] for one in first] == pytest.approx(best, rel=1e-4)
        assert [by_hand[one["feature_index"]] for one in first] == pytest.approx(best, rel=1e-4)
        values = {one["feature_index"]: one["activation_value"] for one in most}
        assert [values[one["feature_index"]] for one in first] == [one["activation_value"] for one in first]
    by_activation = Counter(most[0]["feature_index"] for most in every)
    by_relative = Counter(first[0]["feature_index"] for first in ranked)
    assert max(by_activation.values()) > max(by_relative.values()), "else there would be nothing to mend"
    assert all(one["relative"] is None for most in every for one in most)
    unknown = http.post("/v1/top-k", json={"prompt": TEXT, "source": "0", "rank_by": "relative"})
    assert (unknown.status_code, "rank_by: nothing is known" in unknown.json()["error"]) == (400, True)


def test_what_is_peculiar_to_a_text_comes_first(http: httpx.Client) -> None:
    by_relative = Counter(
        (one["source"], one["index"])
        for one in (strongest(http, text, num_results=1, rank_by="relative")[0] for text in SENTENCES)
    )
    by_activation = Counter(
        (one["source"], one["index"]) for one in (strongest(http, text, num_results=1)[0] for text in SENTENCES)
    )
    assert max(by_relative.values()) <= 2, by_relative
    assert max(by_activation.values()) > 2, "else there would be nothing to mend"


def test_what_cannot_be_ranked_so_is_refused(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "source_set": "neurons", "rank_by": "relative"}
    answer = http.post("/v1/activations", json=body)
    assert answer.status_code == 400
    assert "rank_by: nothing is known of the maxima and densities of 0" in answer.json()["error"]
    assert "LABELS_DIR" in answer.json()["error"]
    indexed = {"prompt": TEXT, "source": SOURCE, "index": 3, "rank_by": "relative"}
    assert "goes without index" in http.post("/v1/activations", json=indexed).json()["error"]
    wrong = http.post("/v1/activations", json={**body, "rank_by": "rarity"})
    assert (wrong.status_code, "rank_by" in wrong.json()["error"]) == (422, True)
