"""The question which features separate two sets of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neuronpedia_inference.costs import reduce_bytes
from neuronpedia_inference.domain import ContrastedFeature, Source, Tokens
from neuronpedia_inference.engine.protocol import Captured
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.points import Point
from neuronpedia_inference.questions.checks import check_prompts
from neuronpedia_inference.questions.features import Steps
from neuronpedia_inference.questions.question import Places, Weights

TEXT_BYTES = 16
"""Of a feature on a text, while it is counted and compared."""

Groups = list[list[ContrastedFeature]]


@dataclass(frozen=True, slots=True, eq=False)
class Contrasted:
    """Groups of features that are alike, the strongest effect first; the first of a group stands for it."""

    a: Groups
    """Those of which set a has more."""
    b: Groups
    n_dense: int
    """Features that fire on some text and were left out because they fire nearly everywhere."""


@dataclass(frozen=True)
class Contrast:
    """Features that fire more on one set of texts than on the other, without dense ones."""

    a: Sequence[Tokens]
    b: Sequence[Tokens]
    sources: Sequence[Source]
    limit: int
    dense: Mapping[str, NDArray[np.bool_]]
    """Per source whose densities are known: [feature] bool."""

    @property
    def prompts(self) -> Sequence[Tokens]:
        return [*self.a, *self.b]

    @property
    def points(self) -> set[Point]:
        return {Point.parse(source.hook) for source in self.sources}

    @property
    def n_bytes(self) -> int:
        widest = max((source.n_features for source in self.sources), default=0)
        return reduce_bytes(self.prompts, self.sources) + TEXT_BYTES * widest * len(self.prompts)

    def check(self, places: Places, vocab_size: int) -> None:
        check_prompts(self.prompts, vocab_size)
        for name, texts in (("a", self.a), ("b", self.b)):
            for number, text in enumerate(texts):
                if all(text.is_special):
                    raise InvalidRequest(f"{name}: text {number} has no tokens beside special ones")

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[Contrasted]:
        import torch

        from neuronpedia_inference.saes import contrast

        counted = [~torch.tensor(prompt.is_special) for prompt in self.prompts]
        found: list[ContrastedFeature] = []
        n_dense = 0
        for source in self.sources:
            dense = self.dense.get(source.name)
            with (yield weights.request(source)) as reader:
                xs = [seen[Point.parse(source.hook)] for seen in captured]
                means = yield from contrast.text_means(reader, xs, counted)
                flags = None if dense is None else torch.as_tensor(dense)
                features, left_out = contrast.strongest(reader, means, len(self.a), self.limit, flags)
            found += features
            n_dense += left_out
        found.sort(key=lambda one: -abs(one.effect_size))
        more_in_a = [one for one in found if one.effect_size > 0]
        more_in_b = [one for one in found if one.effect_size < 0]
        return Contrasted(contrast.grouped(more_in_a, self.limit), contrast.grouped(more_in_b, self.limit), n_dense)
