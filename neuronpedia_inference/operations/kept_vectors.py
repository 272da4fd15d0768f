"""PUT /v1/vectors: vectors that later requests name by their digests."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import persona_here
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.schemas.vectors import AXIS, Digest, PutVectorsRequest, PutVectorsResponse, VectorName

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def put_vectors(request: PutVectorsRequest, rt: Runtime) -> PutVectorsResponse:
    """Raises InvalidRequest for two vectors of one name, or where none are kept."""
    names = [one.name for one in request.vectors]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"vectors: there are two of the name {twice[:80]!r}. Give each a name of its own.")

    def digests() -> Generator[None, None, dict[str, str]]:
        found: dict[str, str] = {}
        for one in request.vectors:
            found[one.name] = rt.vectors.put(one.vector)
            yield
        return found

    return PutVectorsResponse(digests=await paced(digests()))


def of_tensors(tensors: Mapping[str, Numbers]) -> dict[str, Any]:
    """The body that means the same as a file of tensors. Raises InvalidRequest for one that is no single vector."""
    for name, tensor in tensors.items():
        if tensor.ndim > 2 or tensor.ndim == 0 or (tensor.ndim == 2 and len(tensor) != 1):
            raise InvalidRequest(
                f"{name[:80]!r} has the shape {list(tensor.shape)[:8]}; a vector is [width] or [1, width]. "
                "Send the one row that is meant, or their mean."
            )
        if not np.issubdtype(tensor.dtype, np.floating):
            raise InvalidRequest(
                f"{name[:80]!r} holds whole numbers ({tensor.dtype}); send it in float32, float16 or bfloat16."
            )
    return {"vectors": [{"name": name, "vector": tensor.reshape(-1)} for name, tensor in tensors.items()]}


def numbers_of(vector: list[float] | VectorName, rt: Runtime) -> Sequence[float] | Numbers:
    """What was sent, or what is here under its name. Raises UnknownVector, InvalidRequest."""
    if isinstance(vector, Digest):
        return rt.vectors.get(vector)
    if isinstance(vector, VectorName):
        return persona_here(rt).axis(vector.removeprefix(AXIS))
    return vector


PUT_VECTORS = Operation(
    name="put_vectors",
    path="/v1/vectors",
    request=PutVectorsRequest,
    response=PutVectorsResponse,
    summary="Keep vectors, and name them by their digests from then on",
    run=put_vectors,
    method="PUT",
    from_tensors=of_tensors,
    off_modal_because="the next call may reach another container, or one that has started since",
)
