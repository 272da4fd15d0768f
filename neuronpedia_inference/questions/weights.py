"""Questions about the weights of SAEs: no prompt runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuronpedia_inference.domain import FeatureNumbers, FeatureValue, Numbers, Source, TokenEffects, Tokens
from neuronpedia_inference.engine.protocol import Captured
from neuronpedia_inference.points import Point
from neuronpedia_inference.questions.checks import check_index, check_vector
from neuronpedia_inference.questions.features import Steps
from neuronpedia_inference.questions.question import Places, Weights


@dataclass(frozen=True)
class _OfWeights:
    """Nothing is run and nothing captured."""

    source: Source

    @property
    def prompts(self) -> Sequence[Tokens]:
        return ()

    @property
    def points(self) -> frozenset[Point]:
        return frozenset()

    @property
    def n_bytes(self) -> int:
        return 0


@dataclass(frozen=True)
class EncoderColumn(_OfWeights):
    """W_enc[:, index] after folding: [width]."""

    index: int

    def check(self, places: Places, vocab_size: int) -> None:
        check_index(self.source, self.index)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[tuple[float, ...]]:
        with (yield weights.feature(self.source, self.index)) as feature:
            return tuple(feature.encoder_column(self.index).tolist())


@dataclass(frozen=True)
class Weighed(_OfWeights):
    """Everything that the weights say of one feature, with its neighbours and the tokens that it promotes."""

    index: int
    n_neighbours: int
    n_tokens: int

    def check(self, places: Places, vocab_size: int) -> None:
        check_index(self.source, self.index)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[FeatureNumbers]:
        if self.source.is_neurons:
            return FeatureNumbers(None, None, None, None, (), TokenEffects(off_because="a neuron has no decoder row"))
        with (yield weights.feature(self.source, self.index)) as feature:
            encoder = feature.encoder_column(self.index).cpu().numpy()
            bias, threshold = feature.offsets
            if feature.decoder is None:
                effects = TokenEffects(off_because="its source has no decoder rows")
                return FeatureNumbers(encoder, None, bias, threshold, (), effects)
            row = feature.decoder.float()
        with (yield weights.request(self.source)) as reader:
            nearest = reader.nearest_decoder_rows(row, self.n_neighbours + 1)
        yield None
        effects = weights.token_effects(self.source, row, self.n_tokens)
        others = tuple(one for one in nearest if one.index != self.index)[: self.n_neighbours]
        return FeatureNumbers(encoder, row.cpu().numpy(), bias, threshold, others, effects)


@dataclass(frozen=True)
class NearestRows(_OfWeights):
    """Features by cosine similarity of their decoder rows to a query, most alike first.

    The query is another feature's row, `feature`, or else `vector`.
    """

    limit: int
    vector: Sequence[float] | Numbers = ()
    feature: tuple[Source, int] | None = None

    def check(self, places: Places, vocab_size: int) -> None:
        if self.feature is not None:
            check_index(*self.feature)
        else:
            check_vector(self.vector, len(self.vector), self.source.name)  # the reader knows the width of its rows

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[FeatureValue]]:
        if self.feature is None:
            import torch

            row = torch.tensor(self.vector)
        else:
            source, index = self.feature
            with (yield weights.decoder_row(source, index)) as found:
                row = found
        with (yield weights.request(self.source)) as reader:
            return list(reader.nearest_decoder_rows(row, self.limit))
