"""Reading features from a hook's tensor: one interface for SAEs and for a layer's MLP neurons.

What SAELens's `encode` answers is the reference. Where each feature depends on its own encoder column alone,
only the columns asked for are computed. TopK and matching pursuit compare features, and need all of them; temporal SAEs
attend to earlier positions, and need all of a text too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from neuronpedia_inference.costs import COPIED_NUMBERS
from neuronpedia_inference.domain import FeatureValue, Source
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.saes.feature import ACROSS_LAYERS, Columns, FeatureWeights, OneReader, check_rows
from neuronpedia_inference.saes.order import stable_topk

MAX_NEAREST = 128
_ROWS_AT_ONCE = 8192


class FeatureReader(OneReader, Protocol):
    """Features of one source. `x` is one prompt's whole hook tensor [pos, width]; activations are float32."""

    @property
    def steerable(self) -> bool:
        """Whether decoder rows live at the source's own hook."""
        ...

    @property
    def has_rows(self) -> bool:
        """Whether its features have decoder rows of their own."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """[pos, width] -> [pos, n_features]"""
        ...

    def encode_features(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """[pos, width] -> [pos, len(indices)]"""
        ...

    def blocks(self, x: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
        """(first feature, activations [pos, at most `block`]), in feature order."""
        ...

    def decoder_row(self, index: int) -> Tensor:
        """[decoder width], a float32 copy. Raises InvalidRequest for neurons and layers of cross-layer transcoders."""
        ...

    def feature(self, index: int) -> FeatureWeights:
        """A copy, where the weights are. Raises InvalidRequest for neurons."""
        ...

    def nearest_decoder_rows(self, query: Tensor, k: int) -> tuple[FeatureValue, ...]:
        """Features by cosine similarity to `query` [decoder width], descending; k is cut to [1, min(128, F)].

        Raises InvalidRequest for neurons, layers of cross-layer transcoders, and a query of another width.
        """
        ...

    @property
    def n_bytes(self) -> int:
        """What its weights take, where they are."""
        ...

    def free(self) -> None:
        """Give the weights' memory back: nothing can be read afterwards."""
        ...


class LoadedSae:
    """An SAELens SAE with its decoder norms folded in."""

    def __init__(self, source: Source, module: Any) -> None:
        """`module`: the SAELens object; untyped because its classes are imported only while one is loaded."""
        self.source = source
        self.module = module
        self.steerable = not source.is_transcoder
        self.has_rows = source.architecture != ACROSS_LAYERS
        self._is_read_by_column = source.is_read_by_column

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        x = x.to(self.module.device)
        return (self.module.encode(x[None])[0] if self.source.is_temporal else self.module.encode(x)).float()

    @torch.no_grad()
    def predicted(self, x: Tensor) -> Tensor:
        """What a temporal SAE expects at each position from those before: [pos, width] -> [pos, n_features], float32"""
        assert self.source.is_temporal, self.source
        return self.module.encode_with_predictions(x.to(self.module.device)[None])[1][0].float()

    def encode_feature(self, x: Tensor, index: int) -> Tensor:
        return self.encode_features(x, (index,))[:, 0]

    @torch.no_grad()
    def encode_features(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        columns = torch.tensor(indices, dtype=torch.long, device=self.module.device)
        if not self._is_read_by_column:
            return self.encode(x)[:, columns]
        return self._columns(columns)(self._input(x)).float()

    @torch.no_grad()
    def blocks(self, x: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
        if self.source.architecture == "gated":
            # Its encoder is scaled column by column, and a copy of all columns may be larger than the block.
            block = min(block, max(256, COPIED_NUMBERS // self.source.width))
        starts = range(0, self.source.n_features, block)
        if not self._is_read_by_column:
            yield from zip(starts, self.encode(x).split(block, dim=1), strict=True)
            return
        inputs = self._input(x)
        for first in starts:
            yield first, self._columns(slice(first, first + block))(inputs).float()

    def decoder_row(self, index: int) -> Tensor:
        check_rows(self.source)
        return self._copy(self.module.W_dec[index])

    def encoder_column(self, index: int) -> Tensor:
        return self._copy(self._encoder[:, index])

    def feature(self, index: int) -> FeatureWeights:
        module, config = self.module, self.module.cfg
        bias = getattr(module, "b_gate", getattr(module, "b_enc", None))
        more = {name: getattr(module, name, None) for name in ("threshold", "r_mag", "b_mag")}
        takes_off = config.apply_b_dec_to_input and not self.source.is_transcoder
        return FeatureWeights(
            source=self.source,
            index=index,
            encoder=_own(self._encoder[:, index]),
            bias=module.W_dec.new_zeros(()) if bias is None else _own(bias[index]),
            decoder=None if self.source.architecture == ACROSS_LAYERS else _own(module.W_dec[index]),
            b_dec=_own(module.b_dec) if takes_off else None,
            normalisation=config.normalize_activations,
            **{name: None if weights is None else _own(weights[index]) for name, weights in more.items()},
        )

    @torch.no_grad()
    def nearest_decoder_rows(self, query: Tensor, k: int) -> tuple[FeatureValue, ...]:
        check_rows(self.source)
        rows: Tensor = self.module.W_dec
        if query.shape != rows.shape[1:]:
            raise InvalidRequest(
                f"The vector has {query.numel()} numbers, a row of {self.source.name!r} has {rows.shape[1]}."
            )
        query = query.to(rows.device, torch.float32)
        cosine = torch.cat([_cosine(chunk.float(), query) for chunk in rows.split(_ROWS_AT_ONCE)])
        comparable = torch.where(cosine.isnan(), -torch.inf, cosine)
        values, indices = stable_topk(comparable, max(1, min(k, MAX_NEAREST, len(rows))))
        values = torch.where(values.isinf(), 0.0, values)
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        return tuple(FeatureValue(index, value) for index, value in pairs)

    @property
    def n_bytes(self) -> int:
        return sum(weights.nbytes for weights in (*self.module.parameters(), *self.module.buffers()))

    def free(self) -> None:
        # Forgetting the module is not enough: it may hold functions that hold it, until the next garbage collection.
        self.module.to(device="meta")

    @property
    def _encoder(self) -> Tensor:
        """[width, feature]; of tied weights the decoder's."""
        return self.module.W_enc if hasattr(self.module, "W_enc") else self.module.W_dec.T

    def _input(self, x: Tensor) -> Tensor:
        """Cast, normalise and shift as the SAE's configuration says: [pos, width] -> [pos, width]."""
        return self.module.process_sae_in(x.to(self.module.device))

    def _columns(self, columns: slice | Tensor) -> Columns:
        module = self.module
        weights = module.W_enc[:, columns]
        if self.source.architecture == "gated":
            return Columns(weights, module.b_gate[columns], r_mag=module.r_mag[columns], b_mag=module.b_mag[columns])
        threshold = module.threshold[columns] if "jumprelu" in self.source.architecture else None
        return Columns(weights, module.b_enc[columns], threshold)

    def _copy(self, weights: Tensor) -> Tensor:
        # A view would keep the whole matrix alive after its SAE has left.
        return weights.detach().to(torch.float32, copy=True)


class NeuronReader:
    """A layer's MLP neurons: the hook's tensor is the activations."""

    steerable = False
    has_rows = False
    n_bytes = 0

    def __init__(self, source: Source) -> None:
        self.source = source

    def encode(self, x: Tensor) -> Tensor:
        return x.float()

    def encode_feature(self, x: Tensor, index: int) -> Tensor:
        return x[:, index].float()

    def encode_features(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        return x[:, list(indices)].float()

    def blocks(self, x: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.source.n_features, block):
            yield first, x[:, first : first + block].float()

    def decoder_row(self, index: int) -> Tensor:
        raise self._no_weights("decoder")

    def encoder_column(self, index: int) -> Tensor:
        raise self._no_weights("encoder")

    def feature(self, index: int) -> FeatureWeights:
        raise self._no_weights("encoder")

    def nearest_decoder_rows(self, query: Tensor, k: int) -> tuple[FeatureValue, ...]:
        raise self._no_weights("decoder")

    def free(self) -> None:
        """There is nothing to give back."""

    def _no_weights(self, which: str) -> InvalidRequest:
        return InvalidRequest(f"Source {self.source.name!r} is a layer's neurons: it has no {which}.")


def _cosine(rows: Tensor, query: Tensor) -> Tensor:
    """[row, width], [width] -> [row]"""
    return (rows @ query) / (rows.norm(dim=1) * query.norm()).clamp(min=1e-8)


def _own(weights: Tensor) -> Tensor:
    """A copy: a view would keep the whole matrix alive after its SAE has left."""
    return weights.detach().clone(memory_format=torch.contiguous_format)
