"""The collector stays away, and comes back whatever happens."""

from __future__ import annotations

import gc
from contextlib import suppress
from weakref import ref

from neuronpedia_inference.garbage import settle, uncollected


class Circle:
    """Only the collector would let go of it."""

    def __init__(self) -> None:
        self.itself = self


def test_it_comes_back() -> None:
    assert gc.isenabled()
    with suppress(KeyError), uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_what_has_settled_is_looked_at_no_more() -> None:
    kept = Circle()
    watched = ref(kept)
    settle()
    del kept
    gc.collect()
    assert watched() is not None
