"""SAEs that are not served yet, fetched in the background: configured ones from the start on, and those that a request
names where that is allowed.

Nobody waits for them. Who asks meanwhile is told how far it is and to come again; the others are answered as ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

from neuronpedia_inference import downloads
from neuronpedia_inference.errors import InferenceError, LimitExceeded, SourceComing, StartupError, UnknownSource
from neuronpedia_inference.saes.catalogue import SourceSpec, offered
from neuronpedia_inference.saes.files import is_here
from neuronpedia_inference.settings import Settings, variable

log = logging.getLogger(__name__)

AT_ONCE = 4
"""SAEs that are fetched at the same time."""
AGAIN_S = 60.0
"""After which one that could not be fetched is tried again."""
GIB = downloads.GIB


@dataclass
class _Coming:
    """One SAE on its way."""

    began_s: float
    n_bytes: int | None = None
    """To be fetched, once the hub has said it."""
    error: InferenceError | None = None
    ended_s: float = 0.0


class Newcomers:
    """Safe to use from several threads."""

    def __init__(self, settings: Settings, add: Callable[[SourceSpec], None]) -> None:
        """add: has an SAE whose files are here served; raises StartupError."""
        self._settings = settings
        self._add = add
        self._fetchers = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="sae-fetcher")
        self._coming: dict[str, _Coming] = {}
        self._configured: dict[str, SourceSpec] = {}
        """Those that are not served yet."""
        self._lock = Lock()
        self._taken = 0
        """Bytes that have been fetched, or are being fetched."""

    def bring(self, specs: Iterable[SourceSpec]) -> None:
        """Have configured SAEs fetched, the first before others, without any bound but the disk's."""
        wanted = {spec.name: spec for spec in specs}
        with self._lock:
            self._configured |= wanted
        for spec in wanted.values():
            self._ask(spec)

    @property
    def configured(self) -> tuple[SourceSpec, ...]:
        """Those that are not served yet, in the order of the configuration."""
        with self._lock:
            return tuple(self._configured.values())

    def awaited(self, spec: SourceSpec) -> InferenceError:
        """What is answered to who needs one of `configured`."""
        return self._ask(spec)

    def refusal(self, name: str, served: Iterable[str]) -> InferenceError:
        """What is answered to who asks for a source that is not served; a fetch may have begun."""
        configured = self._configured.get(name)
        if configured is not None:
            return self._ask(configured)
        spec = self._listed.get(name)
        if spec is None:
            return UnknownSource.named("source", name[:80], served)
        if spec.listed is not None and spec.listed.refused:
            return UnknownSource(f"Source {name!r} is not served: {spec.listed.refused}.")
        if not self._settings.download_on_request:
            return UnknownSource(
                f"Source {name!r} is not served here. It is listed for this model: SAE_SETS={name!r} serves it from "
                "the start, and with DOWNLOAD_ON_REQUEST=1 requests have such SAEs fetched."
            )
        return self._ask(spec)

    def close(self) -> None:
        """What is being fetched is not waited for."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _listed(self) -> Mapping[str, SourceSpec]:
        """What the directory has for the model, by name."""
        try:
            return {spec.name: spec for one in offered(self._settings.sae_model_id) for spec in one.specs}
        except StartupError:  # such as a model in a folder
            return {}

    def _ask(self, spec: SourceSpec) -> InferenceError:
        now = time.monotonic()
        with self._lock:
            coming = self._coming.get(spec.name)
            is_new = coming is None or (coming.error is not None and now > coming.ended_s + AGAIN_S)
            if coming is None or is_new:
                coming = self._coming[spec.name] = _Coming(now)
        if is_new:  # without the lock: one that has ended already calls back at once
            begun = coming
            fetching = self._fetchers.submit(self._fetch, spec, begun)
            fetching.add_done_callback(lambda done: self._end(spec, begun, done))
        elif coming.error is not None:
            return coming.error
        size = "" if coming.n_bytes is None else f", {coming.n_bytes / GIB:.2f} GiB"
        return SourceComing(
            f"Source {spec.name!r} is being fetched{size}, for {now - coming.began_s:.0f} s now. Ask again soon."
        )

    def _fetch(self, spec: SourceSpec, coming: _Coming) -> None:
        """Raises StartupError or LimitExceeded."""
        if not is_here(spec):
            sizes = downloads.missing_sizes(spec)
            coming.n_bytes = sum(sizes.values())
            with ExitStack() as unless_fetched:
                if spec.name in self._configured:
                    downloads.check_disk(downloads.disk_bytes(sizes))
                else:
                    self._check(spec, sizes)
                    unless_fetched.callback(self._give_back, coming.n_bytes)
                log.info("fetching source %s: %.2f GiB", spec.name, coming.n_bytes / GIB)
                downloads.fetch_sae(spec)
                unless_fetched.pop_all()
        self._add(spec)

    def _check(self, spec: SourceSpec, sizes: Mapping[str, int]) -> None:
        """Takes the bytes. Raises LimitExceeded where a bound would be passed, StartupError where the disk is full."""
        largest, total = max(sizes.values(), default=0), sum(sizes.values())
        if largest > self._settings.download_file_gib * GIB:
            raise _too_large(spec, f"a file of it has {largest / GIB:.2f} GiB", "download_file_gib", self._settings)
        downloads.check_disk(downloads.disk_bytes(sizes))
        with self._lock:
            if self._taken + total > self._settings.download_total_gib * GIB:
                what = f"requests would have had {(self._taken + total) / GIB:.2f} GiB fetched in all"
                raise _too_large(spec, what, "download_total_gib", self._settings)
            self._taken += total

    def _give_back(self, n_bytes: int) -> None:
        with self._lock:
            self._taken -= n_bytes

    def _end(self, spec: SourceSpec, coming: _Coming, done: Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is None:
            with self._lock:
                self._coming.pop(spec.name, None)
                self._configured.pop(spec.name, None)
            return
        log.warning("source %s could not be fetched: %s", spec.name, error, exc_info=error)
        coming.ended_s = time.monotonic()
        coming.error = error if isinstance(error, InferenceError) else _failed(spec)


def _too_large(spec: SourceSpec, what: str, field: str, settings: Settings) -> LimitExceeded:
    bound = f"{variable(field)} is {getattr(settings, field):g}"
    return LimitExceeded(
        f"Source {spec.name!r} is not fetched: {what}, and {bound}. Raise it, or name the source in SAE_SETS."
    )


def _failed(spec: SourceSpec) -> SourceComing:
    again = f"It is tried again after {AGAIN_S:.0f} s."
    return SourceComing(f"Source {spec.name!r} could not be fetched; the server's log says why. {again}")
