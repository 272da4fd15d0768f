"""What answers depend on beside the request: weights of the model and of SAEs, versions, precision and products."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from neuronpedia_inference.digests import Digests, Hasher, Stamp
from neuronpedia_inference.engine.protocol import ModelInfo
from neuronpedia_inference.saes.store import SaeStore
from neuronpedia_inference.saes.stored import Version

PACKAGES = ("neuronpedia-inference", "torch", "transformers")
LOOK_AGAIN_S = 0.02


@dataclass(frozen=True)
class Files:
    """Of a model or an SAE."""

    status: Literal["known", "pending", "changed"]
    files: Digests = ()
    """In order of their names; empty unless known."""

    @property
    def sha256(self) -> str | None:
        """Of what `sha256sum` prints for all of them."""
        if self.status != "known":
            return None
        lines = "".join(f"{one.sha256}  {one.name}\n" for one in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()


class Provenance:
    """Digests are computed once, from `begin` on, beside everything else."""

    def __init__(
        self,
        model: ModelInfo,
        store: SaeStore,
        *,
        files: Sequence[Stamp] | None,
        products: Mapping[str, Sequence[str]],
        folder: Path,
    ) -> None:
        """files: the model's, as they were when it was loaded; None where they are not known. folder: of digests."""
        self.name = Path(model.id).name if Path(model.id).is_dir() else model.id
        self.device = model.device.partition(":")[0]
        self.dtype = model.dtype
        self.products = products
        """By shape of the weights, what each number of rows is multiplied with; empty where it is torch's own."""
        self.versions = {name: version(name) for name in PACKAGES}
        self._store = store
        self._hasher = Hasher(folder)
        self._known: dict[tuple[Stamp, ...], Future[Digests]] = {}
        self._files = None if files is None else tuple(sorted(files, key=lambda one: one.path.name))

    def begin(self) -> None:
        """Compute the digests of the model, beside everything else."""
        if self._files is not None:
            self._state(self._files)

    @property
    def model(self) -> Files:
        """The model's files."""
        return Files("changed") if self._files is None else self._state(self._files)

    def source(self, name: str) -> Files:
        """The files of an SAE, as they were when it was described."""
        described = self._store.files(name)
        if not described:
            return Files("changed")
        try:
            stamps = {path: Stamp.of(path) for path in described}
        except OSError:
            return Files("changed")
        if any(_version(stamp) != described[path] for path, stamp in stamps.items()):
            return Files("changed")
        return self._state(tuple(sorted(stamps.values(), key=lambda one: one.path.name)))

    async def settled(self, sources: Sequence[str], seconds: float) -> None:
        """Wait until nothing of the model and these SAEs is pending, or so long."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if all(one.status != "pending" for one in (self.model, *map(self.source, sources))):
                return
            await asyncio.sleep(LOOK_AGAIN_S)

    def close(self) -> None:
        """What is pending stays so."""
        self._hasher.close()

    def _state(self, files: tuple[Stamp, ...]) -> Files:
        if files not in self._known:
            self._known[files] = self._hasher.request(files)
        found = self._known[files]
        if not found.done():
            return Files("pending")
        return Files("changed") if found.exception() is not None else Files("known", found.result())


def _version(stamp: Stamp) -> Version:
    return Version(stamp.n_bytes, stamp.changed_ns, stamp.inode)
