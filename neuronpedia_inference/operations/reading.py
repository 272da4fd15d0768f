"""activations and top_k: what fires on one text or several, with labels and defaults, at positions of all tokens.

Both count alike, with a feature's index and without: `tokens` are all there are, BOS is marked, and every position is a
place in them. What does not fire is left out, unless it was asked for by its index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuronpedia_inference.domain import FeatureActivations, RankedFeature, RankedFeatures, Source, Tokens, TopFeatures
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded, UnknownSource
from neuronpedia_inference.operations.activation import dfa_fields, rankings
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import (
    check_model,
    choose_source,
    counted_from,
    the_only,
    tokenize_prompts,
)
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.operations.top_k import tops
from neuronpedia_inference.questions import OneFeature
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.activation import (
    ActivationAllBatchRequest,
    ActivationsRequest,
    ActivationsResponse,
    ActivationsResult,
    ActivationTopkByTokenBatchRequest,
    LabelledFeature,
    LabelledToken,
    LabelledTopFeature,
    TopKRequest,
    TopKResponse,
    TopKResult,
)

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def activations(request: ActivationsRequest, rt: Runtime) -> ActivationsResponse:
    """Raises InvalidRequest for an empty text or where source or set must be named, and what activation/all raises."""
    texts = _texts(request.prompt)
    with reproducibly(request.reproducible):
        if request.index is None:
            return await _strongest(request, texts, rt)
        if request.rank_by != "activation":
            raise InvalidRequest("rank_by: goes without index, whose feature stands alone")
        if request.min_activation:
            raise InvalidRequest("min_activation: goes without index, whose feature is shown whatever it does")
        return await _one_feature(request, request.index, texts, rt)


async def top_k(request: TopKRequest, rt: Runtime) -> TopKResponse:
    """Raises InvalidRequest for an empty text or an open source, and what activation/topk-by-token raises."""
    source = choose_source(request.source, lambda: rt.shelf.all_sources)
    relative = request.rank_by == "relative"
    wire = ActivationTopkByTokenBatchRequest(
        prompts=_texts(request.prompt),
        model=request.model or rt.model.id,
        source=source,
        top_k=request.top_k,
        ignore_bos=request.ignore_bos,
    )
    with reproducibly(request.reproducible):
        found = await tops(wire, wire.prompts, rt, relative=relative)
    return TopKResponse.model_construct(
        results=[
            TopKResult.model_construct(
                source=source,
                tokens=list(tokens.strings),
                has_bos=tokens.has_bos,
                positions=_positions(
                    tokens, top, source, counted_from(tokens, ignore_bos=request.ignore_bos), rt, relative=relative
                ),
            )
            for tokens, top in found
        ]
    )


def _texts(prompt: str | list[str]) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if "" in texts:
        which = "the text" if isinstance(prompt, str) else f"text {texts.index('') + 1} of {len(texts)}"
        raise InvalidRequest(f"prompt: {which} is empty, so there is nothing to read. Send at least one character.")
    return texts


def _choose_set(request: ActivationsRequest, rt: Runtime) -> tuple[str, list[str]]:
    """Source set and the sources selected from it; no source means all of the set."""
    if request.source is not None:
        return request.source_set or rt.shelf.source(request.source).source_set, [request.source]
    if request.source_set is not None:
        return request.source_set, []
    return the_only("source_set", rt.shelf.source_sets), []


async def _strongest(request: ActivationsRequest, texts: list[str], rt: Runtime) -> ActivationsResponse:
    source_set, selected = _choose_set(request, rt)
    relative = request.rank_by == "relative"
    most, wanted = rt.settings.max_results, request.num_results
    if "num_results" in request.model_fields_set and wanted is not None and wanted > most:
        raise LimitExceeded(f"num_results is {wanted}, the most is {most}. Ask for fewer or raise MAX_RESULTS.")
    wire = ActivationAllBatchRequest(
        prompts=texts,
        model=request.model or rt.model.id,
        source_set=source_set,
        selected_sources=selected,
        sort_by_token_indexes=[],
        ignore_bos=request.ignore_bos,
        num_results=request.num_results,
    )
    return ActivationsResponse.model_construct(
        results=[
            ActivationsResult.model_construct(
                tokens=list(tokens.strings), has_bos=tokens.has_bos, features=_firing(found, rt, relative=relative)
            )
            for tokens, found in await rankings(wire, texts, rt, relative=relative, least=request.min_activation)
        ]
    )


def _firing(found: RankedFeatures, rt: Runtime, *, relative: bool) -> Rows[LabelledFeature]:
    rows = found.firing.tolist()
    return Rows(len(rows), lambda place: _labelled(found[rows[place]], rt, relative=relative))


def _relative(source: str, index: int, activation: float, rt: Runtime) -> float | None:
    """An activation times the feature's peculiarity; None where that is unknown."""
    known = rt.shelf.annotations(source)
    peculiarity = None if known is None else known.peculiarity_of(index)
    return None if peculiarity is None else activation * peculiarity


def _labelled(one: RankedFeature, rt: Runtime, *, relative: bool = False) -> LabelledFeature:
    return LabelledFeature(
        relative=_relative(one.source, one.index, one.max_value, rt) if relative else None,
        source=one.source,
        index=one.index,
        label=rt.shelf.label(one.source, one.index),
        values=one.values.tolist(),
        max_value=one.max_value,
        max_value_index=one.max_value_index,
        **dfa_fields(one.dfa),
    )


async def _one_feature(request: ActivationsRequest, index: int, texts: list[str], rt: Runtime) -> ActivationsResponse:
    check_model(request.model or rt.model.id, rt)
    if "num_results" in request.model_fields_set:
        raise InvalidRequest("num_results: goes without index, which asks for a single feature")
    source = _source_of_one(request, rt)
    batch = tokenize_prompts(rt, texts, "once")
    first = counted_from(batch[0], ignore_bos=request.ignore_bos)
    found = await rt.ask(OneFeature(batch, source, index, dfa_from=first))
    return ActivationsResponse(
        results=[
            ActivationsResult(
                tokens=list(tokens.strings),
                has_bos=tokens.has_bos,
                features=[_labelled(_counted(one, source.name, index, first), rt)],
            )
            for tokens, one in zip(batch, found, strict=True)
        ]
    )


def _source_of_one(request: ActivationsRequest, rt: Runtime) -> Source:
    """Raises UnknownSource for a source that is not of the set named, and InvalidRequest for an open choice."""
    if request.source_set is None:
        return rt.shelf.source(choose_source(request.source, lambda: rt.shelf.all_sources))
    wanted = () if request.source is None else (request.source,)
    members = {source.name: source for source in rt.shelf.source_set(request.source_set, wanted)}
    name = choose_source(request.source, lambda: list(members.values()))
    if name not in members:
        raise UnknownSource.named(f"source of set {request.source_set!r}:", name, members)
    return members[name]


def _counted(found: FeatureActivations, source: str, index: int, first: int) -> RankedFeature:
    """As in a ranking: zero before `first`. What does not fire has no peak that could be explained."""
    values = found.values.copy()
    values[:first] = 0
    peak = int(values.argmax())
    return RankedFeature(
        source=source,
        index=index,
        values=values,
        max_value_index=peak,
        sum_values=0.0,
        dfa=found.dfa if values[peak] > 0 else None,
    )


def _positions(
    tokens: Tokens, top: TopFeatures, source: str, first: int, rt: Runtime, *, relative: bool
) -> Rows[LabelledToken]:
    """One for every token; before `first`, and where nothing fires, without features."""
    assert len(top) == len(tokens), (len(top), len(tokens))

    def at(position: int) -> LabelledToken:
        pairs = zip(top.indices[position].tolist(), top.values[position].tolist(), strict=True)
        return LabelledToken(
            token_position=position,
            token=tokens.strings[position],
            is_special=tokens.is_special[position],
            top_features=[
                LabelledTopFeature(
                    feature_index=index,
                    activation_value=value,
                    label=rt.shelf.label(source, index),
                    relative=_relative(source, index, value, rt) if relative else None,
                )
                for index, value in pairs
                if value > 0 and position >= first
            ],
        )

    return Rows(len(tokens), at)


ACTIVATIONS = Operation(
    name="activations",
    path="/v1/activations",
    request=ActivationsRequest,
    response=ActivationsResponse,
    summary="Labelled features on one prompt or several: the strongest, or one by its index",
    run=activations,
)
TOP_K = Operation(
    name="top_k",
    path="/v1/top-k",
    request=TopKRequest,
    response=TopKResponse,
    summary="Labelled strongest features at each token of one prompt or several",
    run=top_k,
)
