"""No error of a library reaches a caller who lacks the library."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from service.errors import builtin_errors

LIBRARY_ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), RuntimeError, "OutOfMemoryError: CUDA out of"),
    (torch.AcceleratorError("device-side assert"), RuntimeError, "AcceleratorError: device-side assert"),
    (LocalEntryNotFoundError("no such file"), FileNotFoundError, "LocalEntryNotFoundError: no such file"),
]


@pytest.mark.parametrize(("exc", "kind", "text"), LIBRARY_ERRORS, ids=lambda value: str(value)[:30])
def test_it_arrives_as_what_it_is_made_of(exc: Exception, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised, builtin_errors():
        raise exc
    assert type(raised.value) is kind
    assert str(raised.value).startswith(text)
    assert "\n" not in str(raised.value)
    read = (
        f"import pickle, sys; print(type(pickle.loads(bytes.fromhex({pickle.dumps(raised.value).hex()!r}))).__name__)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", read], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kind.__name__


def test_built_in_ones_pass_through() -> None:
    exc = ValueError("two\nlines")
    with pytest.raises(ValueError, match="two") as raised, builtin_errors():
        raise exc
    assert raised.value is exc
