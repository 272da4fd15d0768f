"""activation/single, /all and /source with their batch forms. One prompt is a batch of one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronpedia_inference.domain import (
    ActiveFeatures,
    Dfa,
    FeatureActivations,
    Numbers,
    RankedFeature,
    RankedFeatures,
    Ranking,
    Source,
    Tokens,
)
from neuronpedia_inference.errors import InvalidRequest, UnknownSource
from neuronpedia_inference.operations.kept_vectors import numbers_of
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model, check_size, tokenize_prompts
from neuronpedia_inference.operations.tensors import Columns, Pairs, prefix_of
from neuronpedia_inference.questions import Active, OneFeature, Projection, Strongest
from neuronpedia_inference.schemas.activation import (
    ActivationAllBatchRequest,
    ActivationAllBatchResponse,
    ActivationAllFeature,
    ActivationAllRequest,
    ActivationAllResponse,
    ActivationSingleBatchRequest,
    ActivationSingleBatchResponse,
    ActivationSingleRequest,
    ActivationSingleResponse,
    ActivationSourceRequest,
    ActivationSourceResponse,
    ActivationSourceResult,
    ActivationValues,
    FeatureOrVector,
    RankingFields,
)
from neuronpedia_inference.schemas.common import SeveralPrompts

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

DEFAULT_NUM_RESULTS = 25
PAIR_RULE = "Invalid request data: exactly one of layer/index or vector must be provided"
Found = tuple[Tokens, FeatureActivations]
INDEX = re.compile(r"[0-9]{1,18}", re.ASCII)


async def activation_single(request: ActivationSingleRequest, rt: Runtime) -> ActivationSingleResponse:
    """As the batch form, for one prompt of full length."""
    [result] = await _single(request, [request.prompt], rt)
    return result


async def activation_single_batch(request: ActivationSingleBatchRequest, rt: Runtime) -> ActivationSingleBatchResponse:
    """One result per prompt. Raises InvalidRequest (pair rule, index, empty prompt), UnknownSource, LimitExceeded."""
    return ActivationSingleBatchResponse.model_construct(results=await _single(request, request.prompts, rt))


async def activation_all(request: ActivationAllRequest, rt: Runtime) -> ActivationAllResponse:
    """As the batch form, for one prompt of full length."""
    [result] = await _all(request, [request.prompt], rt)
    return result


async def activation_all_batch(request: ActivationAllBatchRequest, rt: Runtime) -> ActivationAllBatchResponse:
    """One ranking per prompt. Raises InvalidRequest (sort positions), UnknownSource (set, members), LimitExceeded."""
    return ActivationAllBatchResponse.model_construct(results=await _all(request, request.prompts, rt))


async def activation_source(request: ActivationSourceRequest, rt: Runtime) -> ActivationSourceResponse:
    """Everything that fires, per prompt. Raises UnknownSource, LimitExceeded."""
    check_model(request.model, rt)
    source = rt.shelf.source(request.source)
    prompts = tokenize_prompts(rt, request.prompts, "once")
    found = await rt.ask(Active(prompts, source, rt.settings.max_result_values, first=1 if prompts[0].has_bos else 0))
    return ActivationSourceResponse.model_construct(
        results=[
            ActivationSourceResult.model_construct(
                tokens=list(tokens.strings), activeFeatures=_pairs(active, prefix_of(number, is_listed=True))
            )
            for number, (tokens, active) in enumerate(zip(prompts, found, strict=True))
        ]
    )


async def _single(request: FeatureOrVector, prompts: Sequence[str], rt: Runtime) -> list[ActivationSingleResponse]:
    check_model(request.model, rt)
    by_feature = request.source is not None and request.index is not None
    by_vector = request.vector is not None and request.hook is not None
    if by_feature == by_vector:
        raise InvalidRequest(PAIR_RULE)
    if request.source is not None and request.index is not None:
        found, start = await _feature(rt.shelf.source(request.source), _index(request.index), prompts, rt)
    else:
        assert request.hook is not None, request
        assert request.vector is not None, request
        found, start = await _projection(request.hook, numbers_of(request.vector, rt), prompts, rt), 0
    is_listed = isinstance(request, SeveralPrompts)
    return [
        _result(tokens, one, start, prefix_of(number, is_listed=is_listed))
        for number, (tokens, one) in enumerate(found)
    ]


def _index(text: str) -> int:
    if not INDEX.fullmatch(text):
        raise InvalidRequest(f"index {text[:40]!r} is not a decimal number of a feature, such as '42'")
    return int(text)


async def _feature(source: Source, index: int, prompts: Sequence[str], rt: Runtime) -> tuple[list[Found], int]:
    """And where results begin: a BOS token in front is left out for SAEs; neurons keep it."""
    batch = tokenize_prompts(rt, prompts, "once", allow_empty=False)
    start = 1 if batch[0].has_bos and not source.is_neurons else 0
    if any(len(tokens) <= start for tokens in batch):
        raise InvalidRequest("Prompt is empty")
    return list(zip(batch, await rt.ask(OneFeature(batch, source, index, dfa_from=start)), strict=True)), start


async def _projection(hook: str, vector: Sequence[float] | Numbers, prompts: Sequence[str], rt: Runtime) -> list[Found]:
    """Nothing is left out or masked."""
    batch = tokenize_prompts(rt, prompts, "natural", allow_empty=False)
    found = await rt.ask(Projection(batch, hook, vector))
    return [(tokens, FeatureActivations(values)) for tokens, values in zip(batch, found, strict=True)]


def _result(tokens: Tokens, found: FeatureActivations, start: int, prefix: str) -> ActivationSingleResponse:
    """The part from position `start` on, in coordinates of its own."""
    values = found.values[start:]
    top = int(values.argmax())
    return ActivationSingleResponse.model_construct(
        activation=ActivationValues.model_construct(
            values=Columns.of(f"{prefix}values", values),
            max_value=float(values[top]),
            max_value_index=top,
            **dfa_fields(found.dfa, start),
        ),
        tokens=list(tokens.strings[start:]),
        tokens_is_special=list(tokens.is_special[start:]),
    )


def dfa_fields(dfa: Dfa | None, start: int = 0) -> dict[str, Any]:
    """Attribution from position `start` on, as the wire's three fields; the maximum is of what remains."""
    if dfa is None:
        return {}
    values: list[float] = dfa.values[start:].tolist()
    return {
        "dfa_values": values,
        "dfa_target_index": dfa.target_index - start,
        "dfa_max_value": max(values),
    }


async def _all(request: RankingFields, prompts: Sequence[str], rt: Runtime) -> list[ActivationAllResponse]:
    is_listed = isinstance(request, SeveralPrompts)
    return [
        ActivationAllResponse.model_construct(
            activations=Columns(
                len(found),
                lambda row, found=found: _ranked(found[row]),
                {f"{prefix_of(number, is_listed=is_listed)}values": found.values},
                lambda row, found=found: _ranked(found[row], bare=True),
            ),
            tokens=list(tokens.strings),
        )
        for number, (tokens, found) in enumerate(await rankings(request, prompts, rt))
    ]


async def rankings(
    request: RankingFields, prompts: Sequence[str], rt: Runtime, *, relative: bool = False, least: float = 0.0
) -> list[tuple[Tokens, RankedFeatures]]:
    """Each prompt with its strongest features, values at full-prompt positions. Raises as `activation_all_batch`.

    relative: ranked by `SourceAnnotations.peculiarity` times the largest activation. least: the smallest of these that
    counts as firing.
    """
    check_model(request.model, rt)
    sources = _selected(request, rt)
    batch = tokenize_prompts(rt, prompts, "once")
    _check_sort_indexes(request.sort_by_token_indexes, batch)
    ranking = Ranking(
        limit=min(rt.settings.max_results, DEFAULT_NUM_RESULTS if request.num_results is None else request.num_results),
        ignore_first=request.ignore_bos and batch[0].has_bos,
        weights=Counter(request.sort_by_token_indexes),
        scales={source.name: peculiarity(source, rt) for source in sources} if relative else {},
        least=least,
    )
    check_size(min(ranking.limit, sum(source.n_features for source in sources)), batch, "features", rt)
    if ranking.limit == 0:
        return [(tokens, RankedFeatures.none(len(tokens))) for tokens in batch]
    return list(zip(batch, await rt.ask(Strongest(batch, sources, ranking)), strict=True))


def peculiarity(source: Source, rt: Runtime) -> Numbers:
    """`SourceAnnotations.peculiarity`: [feature]. Raises InvalidRequest for a source of which nothing is known."""
    known = rt.shelf.annotations(source.name)
    if known is None or np.isnan(known.maximum).all() or np.isnan(known.density).all():
        raise InvalidRequest(
            f"rank_by: nothing is known of the maxima and densities of {source.name}, so its features cannot be "
            "ranked relative to them. Rank by activation, or give them in LABELS_DIR."
        )
    return known.peculiarity


def _selected(request: RankingFields, rt: Runtime) -> tuple[Source, ...]:
    """The sources named, each once, in the order named; all of the set when none is."""
    members = {source.name: source for source in rt.shelf.source_set(request.source_set, request.selected_sources)}
    for name in request.selected_sources:
        if name not in members:
            raise UnknownSource.named(f"source of set {request.source_set!r}:", name, members)
    return tuple(members[name] for name in dict.fromkeys(request.selected_sources or members))


def _check_sort_indexes(indexes: Sequence[int], batch: Sequence[Tokens]) -> None:
    shortest = min(batch, key=len)
    for index in indexes:
        if not 0 <= index < len(shortest):
            raise InvalidRequest(
                f"sort_by_token_indexes: {index} is out of range for a prompt of {len(shortest)} tokens"
            )


def _ranked(row: RankedFeature, *, bare: bool = False) -> ActivationAllFeature:
    """bare: without its values."""
    return ActivationAllFeature(
        source=row.source,
        index=row.index,
        values=[] if bare else row.values.tolist(),
        max_value=row.max_value,
        max_value_index=row.max_value_index,
        sum_values=row.sum_values,
        **dfa_fields(row.dfa),
    )


def _pairs(active: ActiveFeatures, prefix: str) -> Pairs:
    """Feature → (position, value) pairs."""
    columns = ("indices", "starts", "ends", "positions", "values")

    def entry(row: int) -> tuple[str, list[tuple[int, float]]]:
        index, positions, values = active[row]
        return str(index), [(position, round(value, 3)) for position, value in zip(positions, values, strict=True)]

    return Pairs(len(active), entry, {prefix + name: getattr(active, name) for name in columns})


ACTIVATION_SINGLE = Operation(
    name="activation_single",
    path="/v1/activation/single",
    request=ActivationSingleRequest,
    response=ActivationSingleResponse,
    summary="Activations of one feature, or projections on a vector, over one prompt",
    run=activation_single,
    casing="both",
    has_tensors=True,
)
ACTIVATION_SINGLE_BATCH = Operation(
    name="activation_single_batch",
    path="/v1/activation/single-batch",
    request=ActivationSingleBatchRequest,
    response=ActivationSingleBatchResponse,
    summary="Activations of one feature, or projections on a vector, over up to 4 prompts",
    run=activation_single_batch,
    casing="both",
    has_tensors=True,
)
ACTIVATION_ALL = Operation(
    name="activation_all",
    path="/v1/activation/all",
    request=ActivationAllRequest,
    response=ActivationAllResponse,
    summary="The features of a source set that fire most on one prompt",
    run=activation_all,
    has_tensors=True,
)
ACTIVATION_ALL_BATCH = Operation(
    name="activation_all_batch",
    path="/v1/activation/all-batch",
    request=ActivationAllBatchRequest,
    response=ActivationAllBatchResponse,
    summary="The features of a source set that fire most, for up to 4 prompts",
    run=activation_all_batch,
    has_tensors=True,
)
ACTIVATION_SOURCE = Operation(
    name="activation_source",
    path="/v1/activation/source",
    request=ActivationSourceRequest,
    response=ActivationSourceResponse,
    summary="Every feature of a source that fires, with its positions and activations",
    run=activation_source,
    has_tensors=True,
)
