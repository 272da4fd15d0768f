"""Everything that gives features, by name: SAEs, sets of them, a layer's neurons, and what features are called."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from torch import Tensor

from neuronpedia_inference.annotations import Found, Searcher, SourceAnnotations
from neuronpedia_inference.domain import Source, TokenEffects
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.readout import Readout
from neuronpedia_inference.errors import InferenceError, InvalidRequest, LimitExceeded, UnknownSource
from neuronpedia_inference.points import MLP_POST, ON_THE_STREAM, Point
from neuronpedia_inference.saes.encode import NeuronReader
from neuronpedia_inference.saes.residency import FreeLease
from neuronpedia_inference.saes.specs import SourceSpec
from neuronpedia_inference.saes.store import SaeStore

NEURONS = "neurons"
LONGEST_NAME = 200
"""Of a source, as it is repeated to who asked for it."""


class Newcomers(Protocol):
    """SAEs that are not here yet."""

    @property
    def configured(self) -> tuple[SourceSpec, ...]: ...

    def awaited(self, spec: SourceSpec, /) -> InferenceError: ...

    def refusal(self, name: str, served: Iterable[str], /) -> InferenceError: ...


class Shelf:
    """The sources of one model."""

    def __init__(
        self,
        store: SaeStore,
        engine: ModelEngine,
        annotations: Mapping[str, SourceAnnotations],
        newcomers: Newcomers,
    ) -> None:
        """annotations: of sources of whose features something is known beside their weights."""
        self._store = store
        self._newcomers = newcomers
        self._engine = engine
        self._annotations = annotations
        self._searcher = Searcher(annotations)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The SAEs that are here, in directory order."""
        return self._store.sources

    @property
    def coming(self) -> tuple[str, ...]:
        """Configured ones that are not here yet."""
        return tuple(spec.name for spec in self._newcomers.configured)

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """Every SAE that is configured. Raises SourceComing while one is not here."""
        self._check_here(self._newcomers.configured)
        return self.sources

    @property
    def source_sets(self) -> tuple[str, ...]:
        """Those that are configured."""
        of_here = (source.source_set for source in self.sources)
        return tuple(dict.fromkeys((*of_here, *(spec.source_set for spec in self._newcomers.configured))))

    def source(self, name: str) -> Source:
        """An SAE by its name, or a layer's neurons by a bare integer.

        Raises UnknownSource, and SourceComing or LimitExceeded for one that is to be fetched.
        """
        if name.isascii() and name.isdecimal():
            return self._neurons(name)
        source = self._store.find(name)
        if source is None:
            raise self._newcomers.refusal(name[:LONGEST_NAME], [source.name for source in self.sources])
        return source

    def source_set(self, name: str, wanted: Collection[str] = ()) -> tuple[Source, ...]:
        """Every source of a set; "neurons" is the set of all layers' neurons.

        wanted: names of those that are needed, all if it is empty; there may be others in the answer. Raises
        UnknownSource, and SourceComing where one that is needed is not here yet.
        """
        if name == NEURONS:
            return tuple(self._neurons(str(layer)) for layer in range(self._engine.n_layers))
        coming = [spec for spec in self._newcomers.configured if spec.source_set == name]
        self._check_here([spec for spec in coming if not wanted or spec.name in wanted])
        found = tuple(source for source in self.sources if source.source_set == name)
        if not found:
            raise UnknownSource.named("source set", name[:80], [*self.source_sets, NEURONS])
        return found

    def label(self, source: str, index: int) -> str | None:
        """What a person calls a feature, where someone or something has named it."""
        known = self._annotations.get(source)
        return (known.labels[index] or None) if known is not None and 0 <= index < len(known) else None

    def annotations(self, source: str) -> SourceAnnotations | None:
        """What is known of a source's features beside their weights."""
        return self._annotations.get(source)

    def search(self, text: str, sources: Sequence[str], limit: int) -> list[Found]:
        """As `Searcher.search`. It takes time: call it on a thread of its own."""
        return self._searcher.search(text, sources, limit)

    @property
    def readout(self) -> Readout:
        """From the residual stream to logits. On the worker only."""
        return self._engine.readout

    def token_effects(self, source: Source, row: Tensor, k: int) -> TokenEffects:
        """What a decoder row of the source does to the next token by the direct path. On the worker only."""
        place = Point.parse(source.hook).place
        if not source.is_transcoder and place not in ON_THE_STREAM:
            return TokenEffects(off_because=f"its source is at {place}, which is not on the residual stream")
        if row.numel() != self._engine.d_model:
            return TokenEffects(off_because=f"its decoder row is {row.numel()} wide, the stream {self._engine.d_model}")
        return self._engine.token_effects(row, k)

    def request(self, source: Source) -> Future[Any]:
        """The right to use a source's weights, as soon as they are there: a lease. Fails as `SaeStore.request`."""
        if not source.is_neurons:
            return self._store.request(source.name)
        free: Future[Any] = Future()
        free.set_result(FreeLease(NeuronReader(source)))
        return free

    def feature(self, source: Source, index: int) -> Future[Any]:
        """The weights of one feature, in the place of a lease: a `FeatureWeights`. Raises InvalidRequest for neurons,
        and fails as `SaeStore.request`."""
        _check_has_weights(source)
        return self._store.feature(source.name, index)

    def decoder_row(self, source: Source, index: int) -> Future[Any]:
        """One decoder row, [decoder width] in float32, in the place of a lease. Raises InvalidRequest for neurons, and
        fails as `SaeStore.decoder_row`."""
        _check_has_weights(source)
        return self._store.decoder_row(source.name, index)

    def check_together(self, sources: Sequence[Source]) -> None:
        """Raises LimitExceeded unless the weights of these, each named once, have room beside each other."""
        names = [source.name for source in sources if not source.is_neurons]
        if not self._store.has_room_for(names):
            raise LimitExceeded(
                f"The sources {', '.join(names)} are needed whole at the same time, and have no room together. "
                "Ask for fewer of them at once, or raise SAE_MEMORY_GIB or MAX_LOADED_SAES."
            )

    def stats(self) -> dict[str, int]:
        """What is in memory, and how often it had to be brought there."""
        return self._store.stats()

    def close(self) -> None:
        """Those who wait for weights get NotReady."""
        self._store.close()

    def _check_here(self, specs: Sequence[SourceSpec]) -> None:
        if specs:
            raise self._newcomers.awaited(specs[0])

    def _neurons(self, name: str) -> Source:
        layer = int(name[:8])
        n_layers = self._engine.n_layers
        if layer >= n_layers or len(name) > 8 or str(layer) != name:
            raise UnknownSource(
                f"Unknown source {name[:80]!r}: a bare integer names a layer's neurons, "
                f"and the model has layers 0 to {n_layers - 1}."
            )
        point = Point(layer, MLP_POST)
        self._engine.check(point)
        width = self._engine.width(point)
        return Source(name, NEURONS, layer, point.name, width, width, NEURONS)


def _check_has_weights(source: Source) -> None:
    if source.is_neurons:
        raise InvalidRequest(
            f"Source {source.name!r} is a layer's neurons: it has no encoder and no decoder, only activations."
        )
