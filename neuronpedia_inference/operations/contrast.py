"""contrast: two sets of texts, and the features that separate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from neuronpedia_inference.domain import ContrastedFeature, Source
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations.features import known_numbers, source_named
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model, the_only
from neuronpedia_inference.questions.contrast import Contrast
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.contrast import ContrastRequest, ContrastResponse, SeparatingFeature
from neuronpedia_inference.schemas.features import FeatureName

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def contrast(request: ContrastRequest, rt: Runtime) -> ContrastResponse:
    """Raises UnknownSource, LimitExceeded, and InvalidRequest for an empty text or where a set must be named."""
    if request.model is not None:
        check_model(request.model, rt)
    most = rt.settings.max_results
    if request.limit > most:
        raise LimitExceeded(f"limit is {request.limit}, the most is {most}. Ask for fewer or raise MAX_RESULTS.")
    sources = _sources(request, rt)
    a, b = ([rt.tokenize(text, "once") for text in texts] for texts in (request.a, request.b))
    with reproducibly(request.reproducible):
        found = await rt.ask(Contrast(a, b, sources, request.limit, _dense(sources, request.max_density, rt)))
    return ContrastResponse(
        a=[_separating(group, rt) for group in found.a],
        b=[_separating(group, rt) for group in found.b],
        n_dense=found.n_dense,
    )


def _sources(request: ContrastRequest, rt: Runtime) -> tuple[Source, ...]:
    if request.source is not None:
        source = source_named(request.source, rt)
        if request.source_set is not None and source.source_set != request.source_set:
            raise InvalidRequest(f"source: {source.name} is of the set {source.source_set}, not {request.source_set}")
        return (source,)
    if request.source_set is not None:
        return rt.shelf.source_set(request.source_set)
    return rt.shelf.source_set(the_only("source_set", rt.shelf.source_sets))


def _dense(sources: Sequence[Source], most: float, rt: Runtime) -> dict[str, NDArray[np.bool_]]:
    """Where something is known of a source's densities; a feature of unknown density is not dense there."""
    known = {source.name: rt.shelf.annotations(source.name) for source in sources}
    return {
        name: one.density > most for name, one in known.items() if one is not None and not np.isnan(one.density).all()
    }


def _separating(group: Sequence[ContrastedFeature], rt: Runtime) -> SeparatingFeature:
    first = group[0]
    return SeparatingFeature(
        source=first.source,
        index=first.index,
        label=rt.shelf.label(first.source, first.index),
        effect_size=first.effect_size,
        mean_a=first.mean_a,
        mean_b=first.mean_b,
        share_a=first.share_a,
        share_b=first.share_b,
        alike=[
            FeatureName(source=one.source, index=one.index, label=rt.shelf.label(one.source, one.index))
            for one in group[1:]
        ],
        **known_numbers(rt.shelf.annotations(first.source), first.index, "density"),
    )


CONTRAST = Operation(
    name="contrast",
    path="/v1/contrast",
    request=ContrastRequest,
    response=ContrastResponse,
    summary="The features that separate two sets of texts",
    run=contrast,
)
