"""Features by words, everything known of one, and contrasts, over a real port.

Weights are compared with the SAE's own file and with Hugging Face's final norm and head, taken by hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from served import SECRET, SOURCE, Served
from torch import Tensor

from neuronpedia_inference import embedded
from neuronpedia_inference.embedded.weights import model_folder

MOON = ("10-res-4k", 1608)
ECONOMY = (SOURCE, 1113)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The economy feature's own file, in float32."""
    file = embedded.sae_dir(ECONOMY[0]) / "sae_weights.safetensors"
    return {name: tensor.float() for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def head() -> tuple[Tensor, Tensor]:
    """Hugging Face's own gain of the final norm [d_model], and unembedding [vocab, d_model]."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    return model.model.norm.weight.detach(), model.lm_head.weight.detach()


def get(http: httpx.Client, path: str, **query: Any) -> dict[str, Any]:
    answer = http.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(("source", "index"), [ECONOMY, MOON, ("20-res-4k", 686), ("15-res-4k", 2103)])
def test_documented_features_are_found_by_words_of_their_labels(http: httpx.Client, source: str, index: int) -> None:
    words = embedded.labels(source)[index].replace("·", " ").replace(",", " ")
    found = get(http, "/v1/features", q=words, limit=5)["features"]
    assert (source, index) in [(one["source"], one["index"]) for one in found]
    for one in found:
        assert one["label"] == embedded.labels(one["source"])[one["index"]]
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)


def test_features_are_found_by_words_of_their_contexts(http: httpx.Client) -> None:
    [one] = get(http, "/v1/features", q="economy", source=SOURCE, limit=1)["features"]
    context = one["context"]
    assert len(context["tokens"]) == len(context["values"])
    assert max(context["values"]) == pytest.approx(one["max"], rel=1e-2)  # of three digits
    words = [word for word in "".join(context["tokens"]).split() if word.isalpha() and len(word) > 3]
    again = get(http, "/v1/features", q=" ".join(words), source=SOURCE, limit=10)["features"]
    assert one["index"] in [other["index"] for other in again]
    assert all(other["source"] == SOURCE for other in again)


def test_what_a_feature_s_weights_say(http: httpx.Client, weights: dict[str, Tensor]) -> None:
    source, index = ECONOMY
    found = get(http, f"/v1/features/{source}/{index}")
    norms = weights["W_dec"].norm(dim=1)
    rows = weights["W_dec"] / norms[:, None]
    assert torch.tensor(found["decoder"]) == pytest.approx(rows[index], abs=1e-6)
    assert torch.tensor(found["encoder"]) == pytest.approx(weights["W_enc"][:, index] * norms[index], rel=1e-5)
    assert found["bias"] == pytest.approx(float(weights["b_enc"][index] * norms[index]), rel=1e-5)
    assert found["threshold"] == pytest.approx(float(weights["threshold"][index] * norms[index]), rel=1e-5)
    assert found["norm"] == pytest.approx(1.0, abs=1e-5)
    cosines = rows @ rows[index]
    cosines[index] = -2
    nearest = cosines.topk(10)
    assert [one["index"] for one in found["neighbours"]] == nearest.indices.tolist()
    assert [one["cosine_similarity"] for one in found["neighbours"]] == pytest.approx(nearest.values.tolist(), abs=1e-5)


def test_tokens_that_a_feature_promotes(
    http: httpx.Client, weights: dict[str, Tensor], head: tuple[Tensor, Tensor]
) -> None:
    source, index = ECONOMY
    found = get(http, f"/v1/features/{source}/{index}", limit=5)
    row = weights["W_dec"][index]
    logits = head[1] @ (head[0] * row / row.norm())
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        best = (sign * logits).topk(5)
        assert [one["token_id"] for one in found[name]] == best.indices.tolist()
        assert [sign * one["logit"] for one in found[name]] == pytest.approx(best.values.tolist(), rel=1e-3)
    assert found["no_tokens_because"] is None


def test_what_is_known_beside_the_weights(http: httpx.Client) -> None:
    source, index = ECONOMY
    found = get(http, f"/v1/features/{source}/{index}")
    assert found["label"] == embedded.labels(source)[index] == found["labels"][0]
    assert 0 < found["density"] < 0.1
    assert 0 < found["mean"] < found["max"]
    assert [max(one["values"]) for one in found["contexts"]] == sorted(
        (max(one["values"]) for one in found["contexts"]), reverse=True
    )
    assert all(one["origin"] for one in found["contexts"])


def test_a_neuronpedia_address_names_the_model_too(http: httpx.Client) -> None:
    whole = get(http, f"/v1/features/{embedded.MODEL_ID}/{SOURCE}/1113", limit=1)
    assert whole == get(http, f"/v1/features/{SOURCE}/1113", limit=1)
    escaped = http.get(f"/v1/features/{embedded.MODEL_ID}%2F{SOURCE}/1113?limit=1")
    assert escaped.json() == whole


def test_neurons_have_no_vectors(http: httpx.Client) -> None:
    found = get(http, "/v1/features/3/7")
    assert (found["hook"], found["decoder"], found["neighbours"]) == ("blocks.3.mlp.hook_post", None, [])
    assert found["no_tokens_because"] == "a neuron has no decoder row"


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/v1/features", 422, "q: Field required"),
        ("/v1/features?q=", 422, "q: String should have at least 1 character"),
        ("/v1/features?q=the", 400, "no words to look for"),
        ("/v1/features?q=moon&limit=0", 422, "limit: Input should be greater than or equal to 1"),
        ("/v1/features?q=moon&limit=few", 422, "limit: Input should be a valid integer"),
        ("/v1/features?q=moon&limit=51", 400, "limit is 51, the most is 50. Ask for fewer or raise MAX_RESULTS."),
        ("/v1/features?q=moon&q=sun", 400, "'q' is given twice"),
        ("/v1/features?q=moon&surce=x", 422, "there is no field 'surce'. Did you mean 'source'?"),
        ("/v1/features?q=moon&source=15-res-5k", 400, "Did you mean '15-res-4k'"),
        ("/v1/features?q=moon&source=3", 400, "LABELS_DIR"),
        ("/v1/features/15-res-4k/4096", 400, "out of range for 15-res-4k, which has 4096 features"),
        ("/v1/features/15-res-4k/one", 422, "index: Input should be a valid integer"),
        ("/v1/features/gpt2-small/15-res-4k/1", 400, "Unknown source 'gpt2-small/15-res-4k'"),
        ("/v1/features/15-res-4k/1?limit=129", 422, "limit: Input should be less than or equal to 128"),
    ],
)
def test_bad_questions_are_told_what_is_wrong(http: httpx.Client, path: str, status: int, says: str) -> None:
    answer = http.get(path)
    assert (answer.status_code, says in answer.json()["error"]) == (status, True), answer.text


def test_the_secret_is_asked_for(locked_server: Served) -> None:
    with locked_server.client() as closed, locked_server.client(SECRET) as opened:
        assert closed.get("/v1/features?q=moon").json()["code"] == "unauthorized"
        assert opened.get("/v1/features?q=moon&limit=1").json()["features"]


# Contrasts: three pairs of subjects, in sentences that no text of the annotations has

TOPICS = {
    "economy": [
        "Exports of timber and copper pay for most of what the country buys abroad.",
        "The government cut taxes on small firms, and industry grew by four percent.",
        "Banks lent less, prices rose, and tourism was the only sector that hired.",
        "Farm subsidies take a third of the budget, although agriculture employs few workers.",
    ],
    "moon": [
        "The moon passes between the sun and the earth, and its shadow crosses the sea.",
        "Saturn's largest moon has lakes, and its orbit takes sixteen days.",
        "Astronauts left a mirror on the lunar surface to measure its distance.",
        "The planet turns slowly, and two small moons circle it.",
    ],
    "court": [
        "The judge told the jury to ignore what the witness had said.",
        "Her lawyer appealed, and the court overturned the verdict.",
        "He was charged with theft and sentenced to two years in prison.",
        "The supreme court heard the case and upheld the law.",
    ],
    "cooking": [
        "Chop the onions, fry them in butter and add a spoon of flour.",
        "Bake the bread until the crust is brown, then let it cool.",
        "The soup needs salt, pepper and a little cream.",
        "Mix the sugar with the eggs and pour the batter into a pan.",
    ],
    "army": [
        "The army crossed the river at night and attacked the fort.",
        "Three battalions of infantry held the hill against the enemy's tanks.",
        "The general ordered his soldiers to retreat after the battle.",
        "Troops were sent to the border when the war began.",
    ],
    "music": [
        "The singer recorded her first album with a string quartet.",
        "He plays the piano and writes songs for the band.",
        "The orchestra performed the symphony in a minor key.",
        "Their guitar riffs and drum solos made the concert famous.",
    ],
}
NAMED = {
    "economy": ("econom", "industr", "export", "tax", "trade", "bank", "tourism"),
    "moon": ("moon", "lunar", "orbit", "planet", "solar"),
    "court": ("court", "judge", "law", "crim", "legal", "prison"),
    "cooking": ("cook", "food", "butter", "bread", "salt", "sugar", "flour", "recipe", "sauce", "bake"),
    "army": ("army", "war", "militar", "soldier", "battle", "troop"),
    "music": ("music", "song", "album", "band", "guitar", "piano"),
}


def words_of(http: httpx.Client, found: dict[str, Any]) -> str:
    """The label and the contexts of a feature."""
    known = get(http, f"/v1/features/{found['source']}/{found['index']}", limit=1)
    texts = ["".join(one["tokens"]) for one in known["contexts"]]
    return " ".join([known["label"] or "", *texts]).lower()


@pytest.mark.parametrize(("a", "b"), [("economy", "music"), ("moon", "court"), ("army", "cooking")])
def test_contrasts_name_the_subjects(http: httpx.Client, a: str, b: str) -> None:
    body = {"a": TOPICS[a], "b": TOPICS[b], "limit": 5}
    answer = http.post("/v1/contrast", json=body)
    assert answer.status_code == 200, answer.text
    for side, other, topic in (("a", "b", a), ("b", "a", b)):
        features = answer.json()[side]
        named = n_named(http, features, NAMED[topic])
        assert named >= 1, (topic, features)
        assert named > n_named(http, answer.json()[other], NAMED[topic]), "else its words would be everywhere"
    other = {"a": TOPICS[b], "b": TOPICS[a], "limit": 5}
    turned = http.post("/v1/contrast", json=other).json()
    assert [one["index"] for one in turned["b"]] == [one["index"] for one in answer.json()["a"]]


# What three documents that the SAEs were not trained on are about: a novel, a country, jargon of programmers.
SUBJECTS = {
    "novel": ("ladies", "lady", "sister", "daughter", "mother", "married", "marriage", "husband", "wife", "mr", "mrs"),
    "country": ("government", "military", "country", "economy", "constitution", "election", "independence", "war"),
    "jargon": ("comput", "program", "network", "server", "packet", "jargon", "hardware", "interface", "software"),
}


def held_out(name: str) -> list[str]:
    """Sentences of one of them."""
    text = (Path(__file__).parents[1] / "embedded" / "held_out_excerpt.txt").read_text(encoding="utf-8")
    novel, _, rest = text.partition("Background: ")
    country, _, jargon = rest.partition(":NMI:")
    documents = {"novel": novel, "country": country, "jargon": jargon}
    sentences = re.split(r"(?<=[.!?]) ", " ".join(documents[name].split()))
    return [sentence[:150] for sentence in sentences if len(sentence) > 40][:6]


def n_named(http: httpx.Client, features: list[dict[str, Any]], words: tuple[str, ...]) -> int:
    """How many of the features have one of the words in their labels or contexts."""
    return sum(any(re.search(rf"\b{word}", words_of(http, one)) for word in words) for one in features)


@pytest.mark.parametrize(("a", "b"), [("novel", "country"), ("country", "jargon"), ("jargon", "novel")])
def test_contrasts_of_held_out_documents_name_their_subjects(http: httpx.Client, a: str, b: str) -> None:
    found = http.post("/v1/contrast", json={"a": held_out(a), "b": held_out(b), "limit": 5}).json()
    for side, other, subject in (("a", "b", a), ("b", "a", b)):
        named = n_named(http, found[side], SUBJECTS[subject])
        assert named >= 1, (subject, [one["label"] for one in found[side]])
        assert named > n_named(http, found[other], SUBJECTS[subject]), "else its words would be everywhere"


def test_a_contrast_s_numbers_are_those_of_the_activations(http: httpx.Client) -> None:
    """Each text alone, by the route that gives one feature."""
    a, b = TOPICS["moon"], TOPICS["cooking"]
    found = http.post("/v1/contrast", json={"a": a, "b": b, "source": SOURCE, "limit": 3}).json()["a"][0]

    def mean(text: str) -> float:
        body = {"prompt": text, "model": "x", "source": found["source"], "index": str(found["index"])}
        activation = http.post("/v1/activation/single", json=body).json()
        kept = [
            v for v, s in zip(activation["activation"]["values"], activation["tokens_is_special"], strict=True) if not s
        ]
        return sum(kept) / len(kept)

    means_a, means_b = [mean(text) for text in a], [mean(text) for text in b]
    assert found["mean_a"] == pytest.approx(sum(means_a) / len(a), rel=1e-3)
    assert found["mean_b"] == pytest.approx(sum(means_b) / len(b), rel=1e-3, abs=1e-4)
    assert found["share_a"] == sum(value > 0 for value in means_a) / len(a)
    assert found["share_b"] == sum(value > 0 for value in means_b) / len(b)


def test_dense_features_are_left_out(http: httpx.Client) -> None:
    body = {"a": TOPICS["moon"], "b": TOPICS["cooking"], "source": SOURCE, "limit": 50}
    few = http.post("/v1/contrast", json={**body, "max_density": 0.001}).json()
    many = http.post("/v1/contrast", json={**body, "max_density": 1.0}).json()
    assert all(one["density"] <= 0.001 for side in "ab" for one in few[side])
    assert any(one["density"] > 0.001 for side in "ab" for one in many[side])
    assert few["n_dense"] > many["n_dense"] == 0


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"a": [], "b": ["x"]}, 422, "a: List should have at least 1 item"),
        ({"a": ["x"] * 65, "b": ["x"]}, 400, "a: 65 items are too many, the most is 64. Send fewer."),
        ({"a": ["x"], "b": [""]}, 400, "b: text 0 has no tokens beside special ones"),
        ({"a": ["x"], "b": ["y"], "source_set": "res-5k"}, 400, "Unknown source set 'res-5k'"),
        ({"a": ["x"], "b": ["y"], "source": "15-res-4k", "source_set": "x"}, 400, "is of the set res-4k, not x"),
        ({"a": ["x"], "b": ["y"], "limit": 51}, 400, "the most is 50"),
        ({"a": ["x"], "b": ["y"], "max_density": 0}, 422, "max_density"),
        ({"a": ["x " * 200], "b": ["y"]}, 400, "Text too long"),
    ],
)
def test_bad_contrasts_are_told_what_is_wrong(http: httpx.Client, body: Any, status: int, says: str) -> None:
    answer = http.post("/v1/contrast", json=body)
    assert (answer.status_code, says in answer.json()["error"]) == (status, True), answer.text
