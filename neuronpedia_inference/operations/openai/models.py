"""GET /v1/models: the served model, and its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuronpedia_inference.operations.openai.asking import AT_THE_ADDRESS, model_id, model_ids, variant_of
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.schemas.openai import ModelRequest, ModelsRequest
from neuronpedia_inference.schemas.openai_answers import ModelReply, ModelsReply

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def models(_: ModelsRequest, rt: Runtime) -> ModelsReply:
    """Never refuses."""
    return ModelsReply(object="list", data=[_reply(name, rt) for name in model_ids(rt)])


async def model(request: ModelRequest, rt: Runtime) -> ModelReply:
    """Raises UnknownModel."""
    return _reply(request.model, rt)


def _reply(name: str, rt: Runtime) -> ModelReply:
    variant = variant_of(name, rt)
    return ModelReply.model_construct(
        id=model_id(variant, rt),
        object="model",
        created=rt.started,
        owned_by=rt.model.name,
        steering=None if variant is None else variant.given,
    )


MODELS = Operation(
    name="models",
    method="GET",
    path="/v1/models",
    request=ModelsRequest,
    response=ModelsReply,
    summary="The served model and its variants, in OpenAI's shapes",
    run=models,
    dialect="openai",
    off_modal_because=AT_THE_ADDRESS,
)
MODEL = Operation(
    name="model",
    method="GET",
    path="/v1/models/{model:path}",
    request=ModelRequest,
    response=ModelReply,
    summary="One of them, and what a variant steers with",
    run=model,
    dialect="openai",
    off_modal_because=AT_THE_ADDRESS,
)
