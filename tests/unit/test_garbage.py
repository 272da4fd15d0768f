"""The collector stays away, and comes back whatever happens."""

from __future__ import annotations

import gc
from contextlib import suppress

from neuronpedia_inference.garbage import uncollected


def test_it_comes_back() -> None:
    assert gc.isenabled()
    with suppress(KeyError), uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
