"""search and feature: features by words, and everything that is known of one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronpedia_inference.domain import FeatureValue, Numbers, Source
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded, UnknownSource
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.questions import Weighed
from neuronpedia_inference.schemas.features import (
    FeatureContext,
    FeatureRequest,
    FeatureResponse,
    FoundFeature,
    Neighbour,
    SearchRequest,
    SearchResponse,
    TokenEffect,
)

if TYPE_CHECKING:
    from neuronpedia_inference.annotations import Context, Found, SourceAnnotations
    from neuronpedia_inference.runtime import Runtime


async def search(request: SearchRequest, rt: Runtime) -> SearchResponse:
    """Raises UnknownSource, LimitExceeded, and InvalidRequest where no feature has words or `q` has none."""
    most = rt.settings.max_results
    if request.limit > most:
        raise LimitExceeded(f"limit is {request.limit}, the most is {most}. Ask for fewer or raise MAX_RESULTS.")
    sources = _searched(request.source, rt)
    found = await asyncio.to_thread(rt.shelf.search, request.q, sources, request.limit)
    return SearchResponse.model_construct(features=Rows(len(found), lambda place: _found(found[place], rt)))


async def feature(request: FeatureRequest, rt: Runtime) -> FeatureResponse:
    """Raises UnknownSource, and InvalidRequest for an index out of range."""
    source, index = source_named(request.source, rt), request.index
    weights = await rt.ask(Weighed(source, index, request.limit, request.limit))
    known = rt.shelf.annotations(source.name)
    return FeatureResponse(
        source=source.name,
        index=index,
        label=rt.shelf.label(source.name, index),
        labels=[] if known is None else list(known.labels_of(index)),
        source_set=source.source_set,
        hook=source.hook,
        architecture=source.architecture,
        contexts=_contexts(known, index),
        decoder=_plain(weights.decoder),
        encoder=_plain(weights.encoder),
        norm=None if weights.decoder is None else float(np.linalg.norm(weights.decoder)),
        bias=weights.bias,
        threshold=weights.threshold,
        neighbours=[
            Neighbour(
                source=source.name,
                index=one.index,
                label=rt.shelf.label(source.name, one.index),
                cosine_similarity=one.value,
            )
            for one in weights.neighbours
        ],
        promoted=_tokens(weights.effects.promoted, rt),
        suppressed=_tokens(weights.effects.suppressed, rt),
        no_tokens_because=weights.effects.off_because or None,
        **known_numbers(known, index, "density", "max", "mean"),
    )


def _found(one: Found, rt: Runtime) -> FoundFeature:
    known = rt.shelf.annotations(one.source)
    return FoundFeature(
        source=one.source,
        index=one.index,
        label=rt.shelf.label(one.source, one.index),
        score=one.score,
        context=next(iter(_contexts(known, one.index)), None),
        **known_numbers(known, one.index, "density", "max"),
    )


def source_named(name: str, rt: Runtime) -> Source:
    """A source by its name, or behind a name of the model as in a Neuronpedia address. Raises UnknownSource."""
    try:
        return rt.shelf.source(name)
    except UnknownSource:
        for model in rt.model.known_names:
            if name.startswith(f"{model}/"):
                return rt.shelf.source(name.removeprefix(f"{model}/"))
        raise


def _searched(named: str | None, rt: Runtime) -> list[str]:
    names = [source_named(named, rt).name] if named is not None else [source.name for source in rt.shelf.sources]
    with_words = [name for name in names if _has_words(rt.shelf.annotations(name))]
    if not with_words:
        what = f"of {names[0]}" if named is not None else "that is served"
        raise InvalidRequest(f"No feature {what} has a label or a context to search: LABELS_DIR gives them some.")
    return with_words


def _has_words(known: SourceAnnotations | None) -> bool:
    return known is not None and (any(known.labels) or known.has_contexts)


def known_numbers(known: SourceAnnotations | None, index: int, *names: str) -> dict[str, float | None]:
    """What a source's annotations say of a feature: `density`, `max`, `mean`; None for what is unknown."""
    if known is None:
        return dict.fromkeys(names)
    columns: dict[str, Any] = {"density": known.density, "max": known.maximum, "mean": known.mean}
    values = {name: float(columns[name][index]) for name in names}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _contexts(known: SourceAnnotations | None, index: int) -> list[FeatureContext]:
    return [] if known is None else [_context(one) for one in known.contexts(index)]


def _context(one: Context) -> FeatureContext:
    return FeatureContext(tokens=list(one.tokens), values=list(one.values), origin=one.origin)


def _plain(numbers: Numbers | None) -> list[float] | None:
    return None if numbers is None else numbers.tolist()


def _tokens(effects: Sequence[FeatureValue], rt: Runtime) -> list[TokenEffect]:
    return [TokenEffect(token=rt.decode([one.index]), token_id=one.index, logit=one.value) for one in effects]


SEARCH = Operation(
    name="search",
    method="GET",
    path="/v1/features",
    request=SearchRequest,
    response=SearchResponse,
    summary="Features by words of their labels and contexts",
    run=search,
)
FEATURE = Operation(
    name="feature",
    method="GET",
    path="/v1/features/{source:path}/{index}",
    request=FeatureRequest,
    response=FeatureResponse,
    summary="Everything known of one feature: label, contexts, weights, neighbours, tokens that it promotes",
    run=feature,
)
