"""Vectors that callers have sent to be kept, by the digest of their numbers."""

from __future__ import annotations

import hashlib
import threading

import numpy as np

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.errors import InvalidRequest, UnknownVector
from neuronpedia_inference.recent import Recent
from neuronpedia_inference.schemas.vectors import DIGEST, Digest

NOT_KEPT = (
    "this server keeps no vectors (KEPT_VECTORS_MIB is 0, as on Modal, where the next request may reach another "
    "container): send them with every request, as numbers or base64"
)


class KeptVectors:
    """Immutable, under a budget of bytes; the one that was used least recently leaves first. For several threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._kept: Recent[Digest, bytes] = Recent(budget_bytes, len)
        self._lock = threading.Lock()

    @property
    def budget_bytes(self) -> int:
        return self._kept.budget_bytes

    def put(self, vector: bytes) -> Digest:
        """vector: numbers in float32, the lowest byte first. Raises InvalidRequest where even it alone has no room."""
        digest = Digest(DIGEST + hashlib.sha256(vector).hexdigest())
        with self._lock:
            self._kept.put(digest, lambda: vector, len(vector))
            if self._kept.get(digest) is None:
                because = f"of {len(vector)} bytes is larger than all that is kept (KEPT_VECTORS_MIB)"
                raise InvalidRequest(f"A vector {because}." if self.budget_bytes else f"vectors: {NOT_KEPT}.")
        return digest

    def get(self, digest: Digest) -> Numbers:
        """[n] in float32. Raises UnknownVector."""
        with self._lock:
            vector = self._kept.get(digest)
        if vector is not None:
            return np.frombuffer(vector, "<f4")
        if not self.budget_bytes:
            raise UnknownVector(f"{digest}: {NOT_KEPT}.")
        raise UnknownVector(
            f"The vector {digest} is not kept here: it was never sent to this process, or has made way for others "
            "(KEPT_VECTORS_MIB). Send it again with PUT /v1/vectors, or its numbers instead."
        )
