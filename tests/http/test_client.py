"""The published client, unchanged: every method answers, parses, and means what it should."""

# The client re-exports its names without saying so.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any

import neuronpedia_inference_client as np_client
import pytest
from neuronpedia_inference_client import (
    ActivationAllBatchPostRequest,
    ActivationAllPostRequest,
    ActivationSingleBatchPostRequest,
    ActivationSinglePostRequest,
    ActivationSourcePostRequest,
    ActivationTopkByTokenBatchPostRequest,
    ActivationTopkByTokenPostRequest,
    DefaultApi,
    NPFeature,
    NPSteerChatMessage,
    NPSteerFeature,
    NPSteerMethod,
    NPSteerType,
    NPSteerVector,
    SteerCompletionChatPostRequest,
    SteerCompletionRequest,
    TokenizePostRequest,
    UtilSaeTopkByDecoderCossimPostRequest,
    UtilSaeVectorPostRequest,
)
from neuronpedia_inference_client.exceptions import UnauthorizedException
from served import BOS, MODEL, SECRET, SOURCE, TEXT, WIDTH, Served

TEXTS = [TEXT, "A court heard it."]
RANKING: dict[str, Any] = {"source_set": "res-4k", "sort_by_token_indexes": [], "ignore_bos": True, "num_results": 4}
STEERING: dict[str, Any] = {
    "model": MODEL,
    "steer_method": NPSteerMethod.SIMPLE_ADDITIVE,
    "normalize_steering": False,
    "types": [NPSteerType.STEERED, NPSteerType.DEFAULT],
    "n_completion_tokens": 4,
    "temperature": 0,
    "strength_multiplier": 1,
    "freq_penalty": 0,
    "seed": 16,
}


def api_of(served: Served, secret: str | None) -> DefaultApi:
    configuration = np_client.Configuration(host=f"{served.url}/v1")
    if secret is not None:
        configuration.api_key["SimpleSecretAuth"] = secret
    return DefaultApi(np_client.ApiClient(configuration))


@pytest.fixture(params=["open", "locked"])
def api(request: pytest.FixtureRequest, server: Served, locked_server: Served) -> DefaultApi:
    """The same questions to a server without and with a secret."""
    return api_of(server, None) if request.param == "open" else api_of(locked_server, SECRET)


@pytest.fixture(scope="module")
def strongest(server: Served) -> Any:
    """What fires most on TEXT at SOURCE: something for the other methods to find again."""
    request = ActivationAllPostRequest(prompt=TEXT, model=MODEL, selected_sources=[SOURCE], **RANKING)
    return api_of(server, None).activation_all_post(request)


def test_activation_all(api: DefaultApi) -> None:
    request = ActivationAllPostRequest(prompt=TEXT, model=MODEL, selected_sources=[], **RANKING)
    answer = api.activation_all_post(request)
    assert answer.tokens[0] == BOS
    assert len(answer.activations) == 4
    peaks = [feature.max_value for feature in answer.activations]
    assert peaks == sorted(peaks, reverse=True)
    for feature in answer.activations:
        assert len(feature.values) == len(answer.tokens)
        assert feature.values[0] == 0
        assert feature.values[int(feature.max_value_index)] == feature.max_value == max(feature.values)


def test_activation_all_batch_equals_all(api: DefaultApi, strongest: Any) -> None:
    request = ActivationAllBatchPostRequest(prompts=TEXTS, model=MODEL, selected_sources=[SOURCE], **RANKING)
    answer = api.activation_all_batch_post(request)
    assert len(answer.results) == 2
    first = answer.results[0]
    assert first.tokens == strongest.tokens
    assert [f.index for f in first.activations] == [f.index for f in strongest.activations]
    for mine, theirs in zip(first.activations, strongest.activations, strict=True):
        assert mine.values == pytest.approx(theirs.values, rel=1e-4, abs=1e-3)


def test_activation_single_is_the_value_that_all_gives(api: DefaultApi, strongest: Any) -> None:
    top = strongest.activations[0]
    request = ActivationSinglePostRequest(prompt=TEXT, model=MODEL, source=SOURCE, index=str(top.index))
    answer = api.activation_single_post(request)
    assert answer.tokens == strongest.tokens[1:], "the leading BOS is left out"
    assert answer.activation.values == pytest.approx(top.values[1:], rel=1e-4, abs=1e-3)
    assert answer.activation.max_value == pytest.approx(top.max_value, rel=1e-4)
    assert answer.activation.max_value_index == top.max_value_index - 1
    assert answer.tokens_is_special == [False] * len(answer.tokens)


def test_activation_single_of_a_vector(api: DefaultApi) -> None:
    hook = "blocks.15.hook_resid_post"
    answers = [
        api.activation_single_post(
            ActivationSinglePostRequest(prompt=TEXT, model=MODEL, vector=[scale] * WIDTH, hook=hook)
        ).activation.values
        for scale in (0.5, 1.0)
    ]
    assert any(abs(value) > 1e-3 for value in answers[0])
    assert answers[1] == pytest.approx([2 * value for value in answers[0]], rel=1e-4, abs=1e-3)


def test_activation_single_batch_equals_single(api: DefaultApi, strongest: Any) -> None:
    top = strongest.activations[0]
    request = ActivationSingleBatchPostRequest(prompts=TEXTS, model=MODEL, source=SOURCE, index=str(top.index))
    answer = api.activation_single_batch_post(request)
    assert len(answer.results) == 2
    assert answer.results[0].activation.values == pytest.approx(top.values[1:], rel=1e-4, abs=1e-3)
    for result in answer.results:
        assert len(result.tokens) == len(result.tokens_is_special) == len(result.activation.values)


def test_activation_topk_by_token(api: DefaultApi, strongest: Any) -> None:
    request = ActivationTopkByTokenPostRequest(prompt=TEXT, model=MODEL, source=SOURCE, top_k=3, ignore_bos=True)
    answer = api.activation_topk_by_token_post(request)
    assert [result.token_position for result in answer.results] == list(range(1, len(strongest.tokens)))
    assert [result.token for result in answer.results] == answer.tokens == strongest.tokens[1:]
    top = strongest.activations[0]
    there = answer.results[int(top.max_value_index) - 1].top_features
    assert there[0].feature_index == top.index
    assert there[0].activation_value == pytest.approx(top.max_value, rel=1e-4)
    assert [f.activation_value for f in there] == sorted((f.activation_value for f in there), reverse=True)


def test_activation_topk_by_token_batch(api: DefaultApi) -> None:
    request = ActivationTopkByTokenBatchPostRequest(
        prompts=TEXTS, model=MODEL, source=SOURCE, top_k=2, ignore_bos=False
    )
    answer = api.activation_topk_by_token_batch_post(request)
    assert [result.tokens[0] for result in answer.results] == [BOS, BOS]
    assert all(len(token.top_features) == 2 for result in answer.results for token in result.results)


def test_activation_source_holds_the_strongest_feature(api: DefaultApi, strongest: Any) -> None:
    answer = api.activation_source_post(ActivationSourcePostRequest(prompts=[TEXT], model=MODEL, source=SOURCE))
    (result,) = answer.results
    top = strongest.activations[0]
    assert result.active_features is not None
    pairs = {int(place): value for place, value in result.active_features[str(top.index)]}
    assert pairs[int(top.max_value_index)] == pytest.approx(top.max_value, rel=1e-4, abs=1e-3)
    assert all(place > 0 for entries in result.active_features.values() for place, _ in entries)


def test_steer_completion(api: DefaultApi, strongest: Any) -> None:
    feature = NPSteerFeature(model=MODEL, source=SOURCE, index=strongest.activations[0].index, strength=900)
    request = SteerCompletionRequest(prompt="I think that", features=[feature], n_logprobs=2, **STEERING)
    outputs = api.steer_completion_post(request).outputs
    assert [output.type for output in outputs] == [NPSteerType.STEERED, NPSteerType.DEFAULT]
    assert outputs[0].output != outputs[1].output
    assert outputs[1].logprobs is not None
    assert len(outputs[1].logprobs) == 4
    for token in outputs[1].logprobs:
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-5), "greedy takes the likeliest"


def test_steer_completion_chat(api: DefaultApi) -> None:
    question = [NPSteerChatMessage(role="user", content="What is the capital of France?")]
    vector = NPSteerVector(steering_vector=[1.0] * WIDTH, strength=0, hook="blocks.15.hook_resid_post")
    request = SteerCompletionChatPostRequest(
        prompt=question, vectors=[vector], steer_special_tokens=False, **{**STEERING, "n_completion_tokens": 7}
    )
    answer = api.steer_completion_chat_post(request)
    steered, default = answer.outputs
    assert steered.raw == default.raw, "a strength of zero changes nothing"
    assert default.raw.startswith(answer.input.raw)
    assert [message.role for message in default.chat_template] == ["user", "assistant"]
    assert "Paris" in default.chat_template[1].content


def test_tokenize(api: DefaultApi) -> None:
    request = TokenizePostRequest(model=MODEL, text="The quick brown fox")
    answer = api.tokenize_post(request)
    assert answer.prepend_bos
    assert answer.token_strings == [BOS, "The", " quick", " brown", " fox"]
    assert len(answer.tokens) == 5
    plain = api.tokenize_post(TokenizePostRequest(model=MODEL, text="The quick brown fox", prepend_bos=False))
    assert plain.tokens == answer.tokens[1:]
    assert not plain.prepend_bos


def test_util_sae_vector(api: DefaultApi) -> None:
    answer = api.util_sae_vector_post(UtilSaeVectorPostRequest(model=MODEL, source=SOURCE, index=5))
    assert answer.hook_name == "blocks.15.hook_resid_post"
    assert len(answer.vector) == WIDTH
    assert any(answer.vector)


def test_util_sae_topk_by_decoder_cossim(api: DefaultApi) -> None:
    feature = NPFeature(model=MODEL, source=SOURCE, index=5)
    request = UtilSaeTopkByDecoderCossimPostRequest(feature=feature, model=MODEL, source=SOURCE, num_results=3)
    answer = api.util_sae_topk_by_decoder_cossim_post(request)
    assert answer.topk_decoder_cossim_features is not None
    nearest = answer.topk_decoder_cossim_features
    assert len(nearest) == 3
    assert nearest[0].feature is not None
    assert nearest[0].feature.index == 5
    assert nearest[0].cosine_similarity == pytest.approx(1.0, abs=1e-4)
    assert nearest[1].cosine_similarity is not None
    assert nearest[1].cosine_similarity < 0.999


@pytest.mark.parametrize("secret", [None, "wrong", SECRET + "x"])
def test_a_wrong_secret_is_unauthorized(locked_server: Served, secret: str | None) -> None:
    with pytest.raises(UnauthorizedException) as caught:
        api_of(locked_server, secret).tokenize_post(TokenizePostRequest(model=MODEL, text="x"))
    assert "X-SECRET-KEY" in str(caught.value.body)
