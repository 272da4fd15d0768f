"""What is asked, as values: the name of an operation, its body, and how its answer is read. Nothing is sent here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from neuronpedia_inference.client.captures import Captured, read_captured
from neuronpedia_inference.client.lens_grid import LensGrid
from neuronpedia_inference.client.replays import Replay, body_of, compared, receipt_in
from neuronpedia_inference.client.results import (
    Contrast,
    Feature,
    Features,
    SearchResults,
    TopFeature,
    TopFeatures,
)
from neuronpedia_inference.client.steering import FeatureName, OfFeature, Steering, Vector
from neuronpedia_inference.client.swept import Scored, Scores, Sweep, SweepCell
from neuronpedia_inference.client.written import Steered
from neuronpedia_inference.errors import InvalidRequest, did_you_mean
from neuronpedia_inference.schemas.lens import LensPromptRequest
from neuronpedia_inference.schemas.vectors import as_base64

Answer = Mapping[str, Any]
Messages = Sequence[Mapping[str, str]]
Out = TypeVar("Out")


@dataclass(frozen=True)
class Call(Generic[Out]):
    """One question to the service."""

    operation: str
    body: Mapping[str, Any]
    read: Callable[[Answer], Out]


@dataclass(frozen=True)
class TensorCall(Generic[Out]):
    """One question that is answered by a file of tensors."""

    operation: str
    body: Mapping[str, Any]
    read: Callable[[bytes], Out]


def features(text: str, **fields: Any) -> Call[Features]:
    return Call("activations", {"prompt": text, **_given(fields)}, lambda answer: _features(answer["results"][0]))


def features_of_several(texts: Sequence[str], **fields: Any) -> Call[list[Features]]:
    body = {"prompt": list(texts), **_given(fields)}
    return Call("activations", body, lambda answer: [_features(one) for one in answer["results"]])


def _features(result: Mapping[str, Any]) -> Features:
    return Features.read(result)


def top_k(text: str, **fields: Any) -> Call[TopFeatures]:
    return Call("top_k", {"prompt": text, **_given(fields)}, lambda answer: _top(answer["results"][0]))


def _top(result: Mapping[str, Any]) -> TopFeatures:
    def each(position: Mapping[str, Any]) -> tuple[TopFeature, ...]:
        return tuple(
            TopFeature(
                result["source"], one["feature_index"], one["activation_value"], one.get("label"), one.get("relative")
            )
            for one in position["top_features"]
        )

    return TopFeatures(tuple(result["tokens"]), tuple(each(position) for position in result["positions"]))


def feature(name: str | OfFeature, index: int | None = None, **fields: Any) -> Call[Feature]:
    """By source and index, or by a name that has both. Raises ValueError for a name that has not."""
    if isinstance(name, str):
        named: OfFeature = FeatureName.read(name) if index is None else FeatureName(name, index)
    else:
        named = name
    body = {"source": named.source, "index": named.index, **_given(fields)}
    return Call("feature", body, Feature.read)


def search(q: str, **fields: Any) -> Call[SearchResults]:
    return Call("search", {"q": q, **_given(fields)}, lambda answer: SearchResults.read(answer, q=q))


def contrast(a: Sequence[str], b: Sequence[str], **fields: Any) -> Call[Contrast]:
    return Call("contrast", {"a": list(a), "b": list(b), **_given(fields)}, Contrast.read)


def steer(
    prompt: str | Messages,
    steering: Steering | None,
    watch: Sequence[OfFeature | Answer | str] | None = None,
    **fields: Any,
) -> Call[Steered]:
    """watch: features, or what `steer` takes for a watch, such as "edits"."""
    sent = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    shown = prompt if isinstance(prompt, str) else "".join(f"{one['role']}: {one['content']}\n" for one in prompt)
    chosen = steering or Steering()
    watched = None if watch is None else [_watch(one) for one in watch]
    body = {"prompt": sent, **(chosen.body() or {"features": []}), **_given({"watch": watched, **fields})}
    return Call("steer", body, lambda answer: _steered(answer, shown, chosen))


def replay(receipt: Answer) -> Call[Replay]:
    was = receipt_in(receipt)
    return Call(was["operation"], body_of(was), lambda answer: compared(was, receipt_in(answer)))


Makers = OfFeature | Steering | Sequence[OfFeature | Steering]
"""What is swept: features are added, steerings multiplied."""


def sweep(prompt: str | Sequence[str], makers: Makers, strengths: Sequence[float], **fields: Any) -> Call[Sweep]:
    """By features alone, or by steerings, features among them being added once."""
    several = [makers] if isinstance(makers, OfFeature | Steering) else list(makers)
    features = [one for one in several if isinstance(one, OfFeature)]
    if len(features) == len(several):
        what: dict[str, Any] = {"features": [{"source": one.source, "index": one.index} for one in features]}
    else:
        steerings = [one if isinstance(one, Steering) else one @ 1 for one in several]
        what = {"steerings": [one.body() for one in steerings]}
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    names = tuple(one.name if isinstance(one, OfFeature) else repr(one) for one in several)
    body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), **what, "strengths": list(strengths)}
    return Call("sweep", {**body, **_given(fields)}, lambda answer: _sweep(answer, prompts, names))


def _sweep(answer: Answer, prompts: tuple[str, ...], names: tuple[str, ...]) -> Sweep:
    texts, default = (tuple(map(SweepCell.of, answer[side])) for side in ("cells", "default"))
    suggested = () if answer["suggested"] is None else tuple(answer["suggested"]["strengths"])
    return Sweep(prompts, names, texts, default, suggested, answer["receipt"])


def score(prompt: str, continuations: Sequence[str], steering: Steering | None, **fields: Any) -> Call[Scores]:
    chosen = (steering or Steering()).body()
    body = {"prompt": prompt, "continuations": list(continuations), **chosen, **_given(fields)}
    return Call("score", body, lambda answer: _scores(answer, prompt, continuations))


def _scores(answer: Answer, prompt: str, continuations: Sequence[str]) -> Scores:
    def one(text: str, result: Mapping[str, Any]) -> Scored:
        known = {name: result[name] for name in ("logprob", "logprob_per_token", "is_greedy")}
        return Scored(text, **known, tokens=tuple(result["tokens"]), logprobs=tuple(result["logprobs"]))

    return Scores(prompt, tuple(one(*pair) for pair in zip(continuations, answer["results"], strict=True)))


def lens(prompt: str | Messages, type: str | Sequence[str], model: str, **fields: Any) -> Call[LensGrid]:
    """model: the one that is asked. Raises InvalidRequest for a field that the operation does not have: its route
    would ignore it."""
    known = [
        name for name in LensPromptRequest.model_fields if name not in ("model", "type", "prompt", "chat", "stream")
    ]
    for name in fields:
        if name not in known:
            near = did_you_mean(name, known) or f" There are {', '.join(known)}."
            raise InvalidRequest(f"lens: there is no field {name!r}.{near}")
    asked = {"prompt": prompt} if isinstance(prompt, str) else {"chat": [dict(message) for message in prompt]}
    types = [type] if isinstance(type, str) else list(type)
    body = {"model": model, "type": types, **asked, "stream": False, **_given(fields)}
    text = prompt if isinstance(prompt, str) and "input_token_ids" not in fields else None
    return Call("lens_prompt", body, lambda answer: LensGrid.of(answer, text))


def _watch(one: OfFeature | Answer | str) -> dict[str, Any] | str:
    if isinstance(one, str):
        return one
    return {"source": one.source, "index": one.index} if isinstance(one, OfFeature) else dict(one)


def _steered(answer: Answer, prompt: str, steering: Steering) -> Steered:
    return Steered.read(answer, prompt=prompt, steering=steering)


def capture(
    prompt: str | Sequence[str] | Messages,
    points: str | Sequence[str],
    steering: Steering | None = None,
    **fields: Any,
) -> TensorCall[list[Captured]]:
    sent = prompt if isinstance(prompt, str) else [one if isinstance(one, str) else dict(one) for one in prompt]
    chosen = (steering or Steering()).body()
    body = {"prompt": sent, "points": [points] if isinstance(points, str) else list(points), **chosen, **_given(fields)}
    return TensorCall("capture", body, read_captured)


def keep(vector: Vector) -> Call[Vector]:
    numbers = vector.vector if isinstance(vector.vector, str) else as_base64(vector.vector)
    body = {"vectors": [{"name": vector.hook, "vector": numbers}]}
    return Call("put_vectors", body, lambda answer: Vector(answer["digests"][vector.hook], vector.hook))


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that were left to the service."""
    return {name: value for name, value in fields.items() if value is not None}
