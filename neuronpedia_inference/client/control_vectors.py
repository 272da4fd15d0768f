"""Control vectors in GGUF files, as repeng and llama.cpp write and read them.

A file has the architecture `controlvector` and tensors `direction.N`, each [d_model]. llama.cpp adds strength times
`direction.N` to what block N gives, blocks counted from 0, at every position: here `add` at `blocks.N.hook_resid_post`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from neuronpedia_inference.client.steering import ADD, Edit, Steering
from neuronpedia_inference.schemas.vectors import BASE64, as_base64, from_base64

if TYPE_CHECKING:
    from neuronpedia_inference.domain import Numbers

ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.([0-9]{1,6})", re.ASCII)
HOOK = re.compile(r"blocks\.([0-9]{1,6})\.hook_resid_post", re.ASCII)
UNREADABLE = (OSError, ValueError, LookupError, OverflowError, TypeError)
"""What the reader raises for a file that is none, or cut off."""


@dataclass(frozen=True)
class ControlVector:
    """A direction for each of several layers. `it @ 1.5` steers as llama.cpp does with `--control-vector-scaled`."""

    directions: Mapping[int, Numbers] = field(repr=False)
    """By block, [d_model] in float32."""
    model_hint: str = ""
    """The kind of model it was made for, as the file says, such as `llama`."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises ValueError for a file that holds no control vector."""
        import gguf

        try:
            reader = gguf.GGUFReader(path)
            kind, hint = (_text(reader, name) for name in ("general.architecture", f"{ARCHITECTURE}.model_hint"))
            tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        except FileNotFoundError:
            raise
        except UNREADABLE as exc:
            raise ValueError(f"{path} is no GGUF file that can be read: {exc}") from None
        if kind != ARCHITECTURE:
            raise ValueError(f"{path} holds {kind or 'something else'}, not a {ARCHITECTURE}")
        return cls(_directions(tensors, str(path)), hint)

    def save(self, path: str | Path) -> None:
        """As a GGUF file."""
        import gguf

        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", self.model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", max(self.directions))
        for layer, direction in sorted(self.directions.items()):
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @classmethod
    def of(cls, steering: Steering, *, model_hint: str = "") -> Self:
        """That does the same. Raises ValueError for a steering with anything else than vectors added behind blocks."""
        found: dict[int, Any] = {}
        for edit in steering.edits:
            hook = HOOK.fullmatch(edit.hook or "")
            if not edit.is_plain or hook is None or edit.vector is None:
                raise ValueError(f"a control vector adds vectors at blocks.N.hook_resid_post, it cannot hold {edit}")
            if int(hook[1]) == 0:
                raise ValueError("a control vector has no direction for block 0: llama.cpp does not steer it")
            found[int(hook[1])] = found.get(int(hook[1]), 0) + (edit.amount or 0.0) * _numbers(edit.vector)
        if not found:
            raise ValueError("there is no vector in this steering")
        return cls({layer: total.astype("<f4") for layer, total in found.items()}, model_hint)

    def __matmul__(self, strength: float) -> Steering:
        return Steering(
            tuple(
                Edit(ADD, vector=as_base64(direction), hook=f"blocks.{layer}.hook_resid_post", amount=float(strength))
                for layer, direction in sorted(self.directions.items())
            )
        )

    def only(self, layers: Sequence[int]) -> Self:
        """Of these layers alone. Raises KeyError for one that has no direction."""
        return type(self)({layer: self.directions[layer] for layer in layers}, self.model_hint)

    def __repr__(self) -> str:
        return f"ControlVector({len(self.directions)} layers, {self.model_hint or 'of any model'})"


def _text(reader: Any, name: str) -> str:
    known = reader.get_field(name)
    return "" if known is None else str(known.contents())


def _directions(tensors: Mapping[str, Numbers], path: str) -> dict[int, Numbers]:
    found: dict[int, Numbers] = {}
    for name, numbers in tensors.items():
        named = DIRECTION.fullmatch(name)
        if named is None or int(named[1]) == 0 or numbers.ndim != 1:
            raise ValueError(
                f"{path} has a tensor {name[:40]!r} of shape {list(numbers.shape)}, which is no direction.N"
            )
        found[int(named[1])] = numbers.astype("<f4")
    if len({len(one) for one in found.values()}) != 1:
        raise ValueError(f"{path} has {'directions of several widths' if found else 'no direction'}")
    return dict(sorted(found.items()))


def _numbers(vector: Sequence[float] | str) -> Numbers:
    import numpy

    if not isinstance(vector, str):
        return numpy.asarray(vector, dtype=numpy.float64)
    if not vector.startswith(BASE64):
        raise ValueError(f"the numbers of {vector[:20]}... are where the service keeps them, not here")
    return from_base64(vector).astype(numpy.float64)
