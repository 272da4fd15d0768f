"""Start-up: from settings to a model, a codec and SAEs, or one line that says what is wrong."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neuronpedia_inference import downloads, embedded, kept
from neuronpedia_inference.annotations import SourceAnnotations, read_folder
from neuronpedia_inference.digests import Stamp
from neuronpedia_inference.domain import Source
from neuronpedia_inference.embedded.weights import default_cache_dir
from neuronpedia_inference.engine import weights
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.linear import (
    TIMED_BY,
    TIMED_ROWS,
    Chosen,
    Shape,
    choose_products,
    described,
    names_of,
)
from neuronpedia_inference.engine.memory import free_bytes
from neuronpedia_inference.engine.protocol import ModelInfo
from neuronpedia_inference.engine.tokens import TextCodec
from neuronpedia_inference.errors import StartupError, UnknownPoint
from neuronpedia_inference.host_memory import n_bytes_to_come
from neuronpedia_inference.jacobian_files import jacobian_file
from neuronpedia_inference.lenses.jacobians import Jacobians, read_jacobians
from neuronpedia_inference.load_options import without_places
from neuronpedia_inference.memory import needs_at_start
from neuronpedia_inference.newcomers import Newcomers
from neuronpedia_inference.points import Point
from neuronpedia_inference.provenance import Provenance
from neuronpedia_inference.room import allocating, check_fits, room_on
from neuronpedia_inference.saes.catalogue import SaeCatalogue, aliases, resolve
from neuronpedia_inference.saes.names import hugging_face_name
from neuronpedia_inference.saes.specs import SourceSpec
from neuronpedia_inference.saes.store import SaeStore
from neuronpedia_inference.settings import Settings

log = logging.getLogger(__name__)

SAE_SHARE = 0.7
"""Of the memory that is free once the model is loaded."""
REQUEST_SHARE = 0.5
"""Of what is left once the SAEs have come too, as many as may be there together."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Loaded:
    """Everything that takes long to make."""

    engine: ModelEngine
    codec: TextCodec
    store: SaeStore
    info: ModelInfo
    annotations: Mapping[str, SourceAnnotations]
    """Of sources of whose features something is known beside their weights."""
    request_bytes: int
    """Memory that all requests together may take."""
    newcomers: Newcomers
    """SAEs that requests may have fetched."""
    provenance: Provenance
    """What answers depend on beside the request."""
    jacobians: Jacobians = field(default_factory=Jacobians)


@dataclass(frozen=True)
class HostWeights:
    """A model in host memory, with its tokenizer."""

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None
    """None for quantised weights, which are loaded where they will run."""
    was_here: bool = True
    """Whether all of the model's files were on this machine."""

    def are_those_of(self, settings: Settings) -> bool:
        """Whether these are the weights that `settings` ask for."""
        wanted = ("weights_id", "model_dtype", "model_from_pretrained_kwargs")
        return all(getattr(self.settings, name) == getattr(settings, name) for name in wanted)


@dataclass(frozen=True)
class _Checkpoint:
    """Where a model's files are, and what else is said to those who read them."""

    where: str
    options: Mapping[str, Any]
    is_here: bool

    def reading(self) -> AbstractContextManager[None]:
        """Nothing asks the hub inside, if all files are on this machine."""
        return downloads.hub_left_alone() if self.is_here else nullcontext()


def _checkpoint(settings: Settings) -> _Checkpoint:
    """Raises StartupError where neither this machine nor the hub has it."""
    options = settings.model_from_pretrained_kwargs
    folder = downloads.found(settings)
    if folder is not None:
        return _Checkpoint(str(folder), without_places(options), is_here=True)
    name = hugging_face_name(settings.weights_id)
    downloads.check_hub(name, settings.weights_variable, options)
    return _Checkpoint(name, options, is_here=False)


def fetch_everything(settings: Settings, progress: Progress) -> bool:
    """Have all files here that a start needs; whether some had to be downloaded. Raises StartupError.

    The Jacobian lens of a model comes with it, if there is one.
    """
    if not downloads.fetch_everything(settings, progress):
        return False
    with suppress(StartupError):
        jacobian_file(settings, progress, asks_hub=True)
    return True


def load_on_host(settings: Settings, progress: Progress) -> HostWeights:
    """What can be loaded without asking for a GPU, so that a memory snapshot may hold it. Raises StartupError."""
    needs, room = needs_at_start(settings), room_on(torch.device("cpu"))
    check_fits(settings.weights_id, needs, room)
    progress(f"Finding the weights of {settings.weights_id}")
    files = _checkpoint(settings)
    progress(f"Loading {settings.weights_id}")
    with files.reading():
        tokenizer = weights.load_tokenizer(files.where, files.options)
        if weights.quantisation(files.where, files.options) is not None:
            return HostWeights(settings, tokenizer, None, files.is_here)
        with allocating(settings.weights_id, needs, room):
            model = weights.load_weights(files.where, dtype=settings.model_dtype, device="cpu", options=files.options)
    weights.check_vocabulary(files.where, tokenizer, model)
    return HostWeights(settings, tokenizer, model, files.is_here)


def _load_quantised(settings: Settings, tokenizer: PreTrainedTokenizerBase, device: str) -> PreTrainedModel:
    files = _checkpoint(settings)
    with files.reading():
        method = weights.quantisation(files.where, files.options)
        model = weights.load_weights(
            files.where, dtype=settings.model_dtype, device=device, options=files.options, method=method
        )
    weights.check_vocabulary(files.where, tokenizer, model)
    return model


def load(settings: Settings, progress: Progress, host: HostWeights | None = None) -> Loaded:
    """`progress` gets a sentence before each long step; a `host` of other weights is not used. Raises StartupError."""
    torch.set_num_threads(n_threads(settings))
    catalogue = resolve(settings)
    device = weights.pick_device(settings.device)
    needs, room = needs_at_start(settings), room_on(torch.device(device))
    if room.is_gpu:  # a host is judged when weights are read to it
        check_fits(settings.weights_id, needs, room)
    with allocating(settings.weights_id, needs, room):
        return _load(settings, progress, host, catalogue, device)


def _load(
    settings: Settings, progress: Progress, host: HostWeights | None, catalogue: SaeCatalogue, device: str
) -> Loaded:
    if host is None or not host.are_those_of(settings):
        host = load_on_host(settings, progress)
    tokenizer = host.tokenizer
    model = host.model or _load_quantised(settings, tokenizer, device)
    chosen: Mapping[Shape, Chosen] = {}
    if device != "cpu":
        progress(f"Moving {settings.weights_id} to {device}")
        torch.nn.Module.to(model, device)
    else:
        chosen = _choose_products(model, settings)
        log.info("fastest products by weight, for %s rows: %s", TIMED_ROWS, described(chosen))
    stop_ids = _stop_ids(tokenizer.eos_token_id, model.generation_config)
    engine = ModelEngine(
        model,
        model_id=settings.model_id,
        name=settings.weights_id,
        stop_ids=stop_ids,
        max_positions=settings.max_tokens,
        graphs=settings.cuda_graphs,
        cache_dir=default_cache_dir(),
    )
    if settings.cuda_graphs and engine.graphs_off_because:
        log.warning("decode steps are not replayed as CUDA graphs: %s", engine.graphs_off_because)
    codec = TextCodec(tokenizer, chatml_fallback=settings.chatml_fallback)
    free_beside = partial(_free_beside, n_bytes_to_come(model))
    store = SaeStore(
        catalogue.specs,
        dtype=settings.sae_dtype,
        device=str(engine.device),
        max_loaded=settings.max_loaded_saes,
        host_bytes=_bytes(settings.sae_host_gib) or int(SAE_SHARE * free_beside("cpu")),
        budget_bytes=_bytes(settings.sae_memory_gib) or int(SAE_SHARE * free_beside(engine.device)),
    )
    coming = _fetch_some(catalogue.specs, settings, progress)
    store.describe_all(progress, but={spec.name for spec in coming})
    for source in store.sources:
        _check_source(source, engine)
    _say_what_is_asked(store.sources)
    jacobians = _jacobians(settings, engine, progress, asks_hub=not host.was_here)
    sae_bytes = store.most_bytes if coming or settings.download_on_request else store.n_bytes
    left_bytes = max(0, free_beside(engine.device) - sae_bytes)
    request_bytes = _bytes(settings.request_memory_gib) or int(REQUEST_SHARE * left_bytes)
    info = engine.model_info(
        has_bos=codec.has_bos,
        has_chat_template=codec.has_chat_template,
        known_names=_known_names(settings, catalogue.model_key),
    )
    annotations = _annotations(settings, catalogue, store, info)
    newcomers = Newcomers(settings, partial(_add, store, engine))
    newcomers.bring(coming)
    provenance = Provenance(
        info, store, files=_files(settings), products=names_of(chosen), folder=default_cache_dir() / "digests"
    )
    return Loaded(engine, codec, store, info, annotations, request_bytes, newcomers, provenance, jacobians)


def _free_beside(to_come: int, device: torch.device | str) -> int:
    """Bytes that are free there, beside those that weights will take."""
    return max(0, free_bytes(torch.device(device)) - to_come)


def _files(settings: Settings) -> list[Stamp] | None:
    """What was loaded, as it is now; None where it is not found again."""
    try:
        folder = downloads.found(settings)
        return None if folder is None else [Stamp.of(file) for file in downloads.decisive_files(folder, settings)]
    except (OSError, StartupError):
        return None


def _fetch_some(specs: Sequence[SourceSpec], settings: Settings, progress: Progress) -> Sequence[SourceSpec]:
    """Have files of SAEs here that a start needs; the others, which it does not wait for.

    It needs one, so that a start fails where none can be had, and all where LABELS_DIR is to be read for them.
    """
    if settings.labels_dir is not None:
        downloads.fetch_saes(specs, progress)
        return ()
    missing = list(downloads.missing_saes(specs, progress))
    if len(missing) == len(specs) and missing:
        progress(f"Downloading {missing[0].name}")
        downloads.fetch_sae(missing.pop(0))
    if missing:
        progress(f"{len(missing)} SAEs are downloaded while others are served")
    return missing


def _jacobians(settings: Settings, engine: ModelEngine, progress: Progress, *, asks_hub: bool) -> Jacobians:
    """A model without serves everything else."""
    try:
        file = jacobian_file(settings, progress, asks_hub=asks_hub)
        size = {"n_layers": engine.n_layers, "d_model": engine.d_model}
        return read_jacobians(file, **size, device=engine.device, cache_dir=default_cache_dir())
    except StartupError as exc:
        if settings.jlens_source is not None:
            log.warning("there is no Jacobian lens: %s", exc)
        return Jacobians(off_because=str(exc))


def _choose_products(model: PreTrainedModel, settings: Settings) -> Mapping[Shape, Chosen]:
    """Timed once for each kind of machine, and kept in the cache folder."""
    machine = (_cpu_name(), os.cpu_count(), n_threads(settings), torch.__version__, str(model.dtype))
    key = hashlib.sha256(repr((*machine, settings.weights_id, TIMED_ROWS, TIMED_BY)).encode()).hexdigest()[:16]
    file = default_cache_dir() / f"products-{key}.json"
    remembered = kept.read(file)
    chosen = choose_products(model, remembered if isinstance(remembered, dict) else None)
    if names_of(chosen) != remembered:
        kept.write(file, names_of(chosen))
    return chosen


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _annotations(
    settings: Settings, catalogue: SaeCatalogue, store: SaeStore, model: ModelInfo
) -> dict[str, SourceAnnotations]:
    """The embedded SAEs come with some (a local SAE of the same name is another SAE and has none); then LABELS_DIR.

    Raises StartupError for files that cannot be read.
    """
    ours = {embedded.sae_dir(name): name for name in embedded.SOURCES}
    known = {
        ours[spec.folder]: embedded.source_annotations(ours[spec.folder])
        for spec in catalogue.specs
        if spec.folder in ours
    }
    if settings.labels_dir is None:
        return known
    sizes = {source.name: source.n_features for source in store.sources}
    return known | read_folder(settings.labels_dir, sizes, model.known_names, known)


def _bytes(gib: float | None) -> int:
    return int((gib or 0) * 2**30)


def n_threads(settings: Settings) -> int:
    """NUM_THREADS, else all cores but one: the event loop needs its own, and a starved thread stalls all others."""
    return settings.num_threads or max(1, (os.cpu_count() or 2) - 1)


def _add(store: SaeStore, engine: ModelEngine, spec: SourceSpec) -> None:
    """Serve another SAE, whose files are here. Raises StartupError."""
    about = store.describe(spec)
    _check_source(about.source, engine)
    _say_what_is_asked([about.source])
    store.add(spec, about)


def _check_source(source: Source, engine: ModelEngine) -> None:
    """An SAE must fit the model, or its numbers would be of another model. Raises StartupError."""
    try:
        point = Point.parse(source.hook)
        engine.check(point)
    except UnknownPoint as exc:
        raise StartupError(f"Source {source.name!r} does not fit this model: {exc}") from None
    if engine.width(point) != source.width:
        raise StartupError(
            f"Source {source.name!r} reads vectors of width {source.width}, but {source.hook} of this model "
            f"has width {engine.width(point)}."
        )

    if source.is_centred and engine.has_rms_norms:
        raise StartupError(
            f"Source {source.name!r} asks for centred writing weights, which change what this model computes: "
            "its norms do not take off the mean."
        )
    if source.is_unnormed and engine.is_behind_norm(point):
        raise StartupError(
            f"Source {source.name!r} reads what a module gives, but {source.hook} of this model is what a norm "
            "makes of that."
        )


def _say_what_is_asked(sources: Iterable[Source]) -> None:
    asking: dict[str, list[str]] = {}
    for source in sources:
        for words in source.asks:
            asking.setdefault(words, []).append(source.name)
    for words, names in asking.items():
        log.warning("%s ask%s for %s", ", ".join(names), "s" if len(names) == 1 else "", words)


def _stop_ids(eos_id: object, generation_config: object) -> set[int]:
    """The tokenizer's end of sequence and those of the generation config, such as an end-of-turn marker."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (eos_id, *ids) if isinstance(i, int)}


def _known_names(settings: Settings, sae_model: str | None) -> tuple[str, ...]:
    ids = (settings.model_id, settings.override_model_id, settings.custom_hf_model_id, sae_model)
    return tuple(dict.fromkeys(name for i in ids if i for name in (i, *aliases(i))))
