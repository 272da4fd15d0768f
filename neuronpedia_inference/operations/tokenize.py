"""tokenize: a text as the model's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.schemas.tokenize import TokenizeRequest, TokenizeResponse

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def tokenize(request: TokenizeRequest, rt: Runtime) -> TokenizeResponse:
    """`prepend_bos` tells what was done: false when the tokenizer has no BOS."""
    check_model(request.model, rt)
    wanted = request.prepend_bos is not False
    tokens = rt.tokenize(request.text, "prepend" if wanted else "never")
    return TokenizeResponse(
        tokens=list(tokens.ids),
        token_strings=list(tokens.strings),
        prepend_bos=wanted and rt.model.has_bos,
    )


TOKENIZE = Operation(
    name="tokenize",
    path="/v1/tokenize",
    request=TokenizeRequest,
    response=TokenizeResponse,
    summary="Split a text into the model's tokens",
    run=tokenize,
    casing="both",
)
