"""A temporal SAE on a small model over a real port: what it reads of whole texts, against plain Hugging Face hooks and
its formulas, and what is refused of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from served import running
from test_web_application import unread

from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import models
from tests.temporal_by_hand import Temporal

FAMILY, LAYER, SOURCE, OTHER = "llama", 1, "1-temporal", "1-plain"
HOOK = f"blocks.{LAYER}.hook_resid_post"
ONE = Temporal(32, HOOK)
TEXTS = ["The cat sat on the mat.", "Two planets met", "and then", "a much longer text of many tokens than others"]
ROUTE = "/v1/util/similarity-matrix-pred"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("tiny")
    model = models.save(FAMILY, folder / "model")
    ONE.module().save_model(folder / "saes" / SOURCE)
    about = SAEMetadata(hook_name=HOOK, model_name="tiny")
    StandardSAE(StandardSAEConfig(d_in=32, d_sae=24, metadata=about)).save_model(folder / "saes" / OTHER)
    fields = {
        "model_id": str(model),
        "local_sae_dir": folder / "saes",
        "sae_sets": ("temporal", "plain"),
        "num_threads": 1,
    }
    settings = Settings.read(**fields, token_limit=400, max_tokens=450)
    runtime = Runtime.load(settings)
    with running(settings, lambda: runtime) as served, served.client() as client:
        yield client
    runtime.close()


def ids_of(text: str, *, bos: bool) -> list[int]:
    tokenizer: Any = models.tokenizer()
    return [tokenizer.bos_token_id] * bos + tokenizer.encode(text, add_special_tokens=False)


def hidden(text: str, *, bos: bool) -> Any:
    """[pos, width] in plain Hugging Face."""
    return models.read(models.model(FAMILY), FAMILY, ids_of(text, bos=bos), LAYER, "hook_resid_post")


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def similarity(http: httpx.Client, text: str, **more: Any) -> dict[str, Any]:
    return post(http, ROUTE, **{"modelId": "tiny", "sourceId": SOURCE, "index": 3, "text": text, **more})


@pytest.mark.parametrize("text", TEXTS)
def test_predictions_are_as_alike_as_by_hand(tiny: httpx.Client, text: str) -> None:
    told = similarity(tiny, text)
    assert list(told) == ["similarity_matrix", "tokens"], "snake_case, whatever the request has"
    expected = ONE.similarity(hidden(text, bos=False))
    assert told["tokens"] == list(text)[1:]
    np.testing.assert_allclose(told["similarity_matrix"], expected, rtol=0, atol=1e-4)
    shuffled = ONE.similarity(hidden(text, bos=False).flip(0))
    assert np.abs(expected - shuffled).max() > 1e-2, "the tolerance can tell them apart"


def test_the_web_application_reads_the_matrix(tiny: httpx.Client) -> None:
    body = {"modelId": "gemma-2-2b", "sourceId": SOURCE, "index": 7, "text": TEXTS[0]}
    answer = tiny.post(ROUTE, json=body, headers={"Accept-Encoding": "gzip"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-encoding"] == "gzip"
    assert list(unread({"similarity_matrix": [[float]], "tokens": [str]}, answer.json())) == []


def test_both_spellings_and_lax_numbers_are_read_and_the_feature_is_ignored(tiny: httpx.Client) -> None:
    camel = similarity(tiny, TEXTS[0])
    snake = tiny.post(ROUTE, json={"model_id": "x", "source_id": SOURCE, "text": TEXTS[0], "index": "5"})
    assert (snake.status_code, snake.json()) == (200, camel)


def test_one_token_has_nothing_to_be_held_against(tiny: httpx.Client) -> None:
    assert similarity(tiny, "a") == {"similarity_matrix": [], "tokens": []}


def test_texts_share_a_pass_with_other_reads_and_are_read_as_alone(tiny: httpx.Client) -> None:
    alone = [similarity(tiny, text)["similarity_matrix"] for text in TEXTS]
    others = [{"prompt": text, "source": OTHER, "index": "3"} for text in TEXTS]
    with ThreadPoolExecutor(2 * len(TEXTS)) as pool:
        asked = [pool.submit(similarity, tiny, text) for text in TEXTS]
        beside = [pool.submit(post, tiny, "/v1/activation/single", **body) for body in others]
        found = [one.result()["similarity_matrix"] for one in asked]
        assert all(one.result()["activation"]["values"] for one in beside)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_activations_are_its_novel_codes(tiny: httpx.Client) -> None:
    expected = [ONE.codes(hidden(text, bos=True))[0] for text in TEXTS]
    close = {"rtol": 0, "atol": 1e-4 * max(np.abs(one).max() for one in expected)}
    index = int(expected[0][1:].max(axis=0).argmax())
    single = post(tiny, "/v1/activation/single", prompt=TEXTS[0], source=SOURCE, index=str(index))
    np.testing.assert_allclose(single["activation"]["values"], expected[0][1:, index], **close)
    batch = post(tiny, "/v1/activation/single-batch", prompts=TEXTS, source=SOURCE, index=str(index))
    for result, codes in zip(batch["results"], expected, strict=True):
        np.testing.assert_allclose(result["activation"]["values"], codes[1:, index], **close)
    top = post(tiny, "/v1/activation/topk-by-token", prompt=TEXTS[1], source=SOURCE, top_k=2, ignore_bos=False)
    strongest = np.sort(expected[1], axis=1)[:, ::-1][:, :2]
    told = [[one["activation_value"] for one in at["top_features"]] for at in top["results"]]
    np.testing.assert_allclose(told, strongest, **close)
    ranking = {"source_set": "temporal", "selected_sources": [], "sort_by_token_indexes": [], "ignore_bos": True}
    ranked = post(tiny, "/v1/activation/all", prompt=TEXTS[3], **ranking, num_results=3)["activations"]
    best = expected[3][1:].max(axis=0)
    assert [one["index"] for one in ranked] == np.argsort(-best, kind="stable")[:3].tolist()
    np.testing.assert_allclose(ranked[0]["values"][1:], expected[3][1:, ranked[0]["index"]], **close)


def test_a_contrast_is_of_whole_texts(tiny: httpx.Client) -> None:
    """Special tokens do not count, but others see them."""
    told = post(tiny, "/v1/contrast", a=TEXTS[:2], b=TEXTS[2:], source=SOURCE, limit=20)
    expected = [ONE.codes(hidden(text, bos=True))[0][1:].mean(axis=0) for text in TEXTS]
    found = [one for group in (*told["a"], *told["b"]) for one in (group, *group["alike"])]
    assert found
    for one in found:
        means = [float(np.mean([expected[n][one["index"]] for n in pair])) for pair in ((0, 1), (2, 3))]
        assert [one["mean_a"], one["mean_b"]] == pytest.approx(means, abs=1e-4)


def test_vectors_and_steering_are_of_its_decoder_as_it_is(tiny: httpx.Client) -> None:
    row = ONE.weights["W_dec"][7]
    told = post(tiny, "/v1/util/sae-vector", source=SOURCE, index=7)
    assert (told["vector"], told["hookName"]) == (row.tolist(), HOOK)
    body = {"prompt": TEXTS[0], "max_new_tokens": 6, "temperature": 0, "compare": True}
    steered = post(tiny, "/v1/steer", **body, features=[{"source": SOURCE, "index": 7, "strength": 9}])
    net, ids = models.model(FAMILY), ids_of(TEXTS[0], bos=True)
    with models.hooked(net, FAMILY, LAYER, "hook_resid_post", models.formula("add", row, 9.0)):
        expected = models.greedy(net, ids, 6)
    assert steered["steered"]["text"] == models.tokenizer().decode(expected)
    assert steered["default"]["text"] == models.tokenizer().decode(models.greedy(net, ids, 6))
    assert steered["steered"]["text"] != steered["default"]["text"]


def test_a_feature_tells_what_its_weights_say(tiny: httpx.Client) -> None:
    rows = ONE.weights["W_dec"]
    told = tiny.get(f"/v1/features/{SOURCE}/7").json()
    assert (told["architecture"], told["hook"], told["bias"], told["threshold"]) == ("temporal", HOOK, None, None)
    assert told["decoder"] == told["encoder"] == pytest.approx(rows[7].tolist(), abs=1e-6)
    cosines = torch.nn.functional.cosine_similarity(rows, rows[7][None])
    nearest = cosines.argsort(descending=True)[:4].tolist()
    assert [one["index"] for one in told["neighbours"]][:3] == nearest[1:]
    query = {"feature": {"model": "x", "source": SOURCE, "index": 7}, "source": SOURCE, "num_results": 4}
    found = post(tiny, "/v1/util/sae-topk-by-decoder-cossim", **query)["topk_decoder_cossim_features"]
    assert [one["feature"]["index"] for one in found] == nearest
    assert [one["cosine_similarity"] for one in found] == pytest.approx(cosines[nearest].tolist(), abs=1e-5)


FEATURE = {"source": SOURCE, "index": 7}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (ROUTE, {"sourceId": OTHER}, "SAE architecture is not temporal: '1-plain' is of the kind standard"),
    (ROUTE, {"sourceId": "1"}, "SAE architecture is not temporal: '1' is of the kind neurons"),
    (ROUTE, {"sourceId": "9-temporal"}, "Unknown source '9-temporal'"),
    (ROUTE, {"text": ""}, "Prompt is empty"),
    (ROUTE, {"text": "x" * 401}, "Text too long: 401 tokens, max is 400"),
    ("/v1/steer", {"watch": [FEATURE]}, "attends to earlier tokens"),
    ("/v1/steer", {"watch": [{"source": SOURCE, "top_k": 2}]}, "cannot be watched while a text is written"),
    ("/v1/steer", {"edits": [{"do": "clamp", "feature": FEATURE, "amount": 1}]}, "attends to earlier tokens"),
    (
        "/v1/steer",
        {"rules": [{"when": {"feature": FEATURE, "above": 1}, "do": "stop"}]},
        "cannot be watched while a text is written",
    ),
]


@pytest.mark.parametrize(("path", "changes", "says"), REFUSED)
def test_what_is_refused(tiny: httpx.Client, path: str, changes: dict[str, Any], says: str) -> None:
    right = {"modelId": "x", "sourceId": SOURCE, "text": "ab"} if path == ROUTE else {"prompt": "ab"}
    answer = tiny.post(path, json={**right, **changes})
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]


def test_capabilities_say_what_is_served_of_it(tiny: httpx.Client) -> None:
    told = tiny.get("/v1/capabilities").json()
    assert told["endpoints"]["util_similarity_matrix_pred"]
    assert told["edits"]["refused"] == {"temporal: its encoder attends to earlier tokens": [SOURCE]}
