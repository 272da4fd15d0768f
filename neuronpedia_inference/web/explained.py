"""What a person should know about every error code: what it means, an example, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neuronpedia_inference.errors import InferenceError
from neuronpedia_inference.web.auth import HEADER
from neuronpedia_inference.web.connections import HEAD_S, MAX_FRAMING
from neuronpedia_inference.web.parsing import MAX_CONTAINERS

REQUEST_ID = "6f1c2b7e9d3a4f55"
"""Of examples."""


@dataclass(frozen=True)
class Explained:
    """What a person should know about an error code."""

    means: str
    example: str
    remedy: str
    status: int | None = None
    """Only for codes without a class of their own."""
    detail: list[dict[str, Any]] | None = None

    def body(self, code: str) -> dict[str, Any]:
        """An answer with this error."""
        answer = {"error": self.example, "code": code, "request_id": REQUEST_ID}
        return answer if self.detail is None else {**answer, "detail": self.detail}


EXPLAINED: dict[str, Explained] = {
    "invalid_request": Explained(
        "The request is well-formed, but what it asks for cannot be done: fields that exclude each other, an index "
        "that does not exist, a vector of the wrong width, an empty prompt.",
        "Feature index 4096 is out of range for 15-res-4k, which has 4096 features (0 to 4095).",
        "Change the request as the message says. The same request will fail again.",
    ),
    "unknown_source": Explained(
        "The server has no such source or source set. Sources are never loaded because a request names them.",
        "Unknown source '99-res-4k'. Available: 10-res-4k, 15-res-4k, 20-res-4k.",
        "Choose one of the names in the message, or start the server with other `SAE_SETS`. `GET /v1/capabilities` "
        "lists what is served.",
    ),
    "unknown_hook": Explained(
        "The model has no such hook point, or one that can be read but not written was to be steered.",
        "Unknown hook 'blocks.99.hook_resid_post'.",
        "Use TransformerLens's names, such as `blocks.15.hook_resid_post`, with a layer that the model has.",
    ),
    "unknown_vector": Explained(
        "A vector was named by its digest, and the server does not keep it: it was never sent to this process, which "
        "forgets at its end, or others have taken its place.",
        "The vector vec:sha256:5f70... is not kept here: it was never sent to this process, or has made way for others "
        "(KEPT_VECTORS_MIB). Send it again with PUT /v1/vectors, or its numbers instead.",
        "Send the vector again with `PUT /v1/vectors`, and the same request once more.",
    ),
    "no_jacobian_lens": Explained(
        "A Jacobian lens was asked for, and this model has no Jacobians. `detail` says why.",
        "Jacobian lens is not available for this model",
        "Ask for `LOGIT_LENS`, or give the server Jacobians by `JLENS_SOURCE`.",
    ),
    "model_not_found": Explained(
        "On OpenAI's routes: the model's name is neither the served model's nor that of one of its variants.",
        "Unknown model 'gpt-4o'. Available: smollm2-135m-instruct, smollm2-135m-instruct+economy.",
        "Use a name that `GET /v1/models` lists. `VARIANTS` adds variants.",
    ),
    "limit_exceeded": Explained(
        "A bound of the server was passed: tokens in a prompt, tokens of prompt and completion together, items of a "
        "list, `top_k`, activations in an answer.",
        "Text too long: 312 tokens, max is 200",
        "Send less, or raise the limit that the message names (such as `TOKEN_LIMIT` or `MAX_TOP_K`) and restart.",
    ),
    "invalid_body": Explained(
        'The body is not JSON, not an object, or does not fit the schema. Types are strict: `"5"` is not a number.',
        "Invalid request body. top_k: Input should be a valid integer",
        "Mend the fields that `detail` lists; each entry has a `loc`, a `type` and a `msg`. Send "
        "`Content-Type: application/json`.",
        detail=[{"type": "int_type", "loc": ["body", "top_k"], "msg": "Input should be a valid integer"}],
    ),
    "unauthorized": Explained(
        f"The server has a secret, and the request's `{HEADER}` header is missing or wrong.",
        f"Invalid or missing {HEADER} header",
        f"Send the server's `SECRET` in the header `{HEADER}`.",
    ),
    "forbidden": Explained(
        "Without a `SECRET` the server answers only web pages of its own machine (the request's `Origin`), and only by "
        "names of its own (its `Host`), so that no page of somebody else can use it through a browser.",
        "Pages of 'https://example.org' may not call this server. Start it with that origin in ALLOWED_ORIGINS, or set "
        "a SECRET.",
        "Start the server with the name or the origin in `ALLOWED_HOSTS` or `ALLOWED_ORIGINS`, or with a `SECRET`.",
    ),
    "malformed_http": Explained(
        "What came is not HTTP. The connection is closed.",
        "Invalid HTTP request received.",
        "Look at what sends it: TLS to a port that speaks plain HTTP, for instance.",
    ),
    "request_timeout": Explained(
        "The body of the request did not come in whole within `RECEIVE_TIMEOUT`. The connection is closed. One whose "
        f"headers do not come within {HEAD_S:g} s is closed without an answer.",
        "The request body did not come in within 60 s (RECEIVE_TIMEOUT)",
        "Send less at once, or raise `RECEIVE_TIMEOUT` and restart.",
    ),
    "head_too_large": Explained(
        f"Address, headers, chunk sizes and trailers of a request take {MAX_FRAMING} bytes more than its body. "
        "The connection is closed.",
        f"A request's headers and chunk sizes may take {MAX_FRAMING} bytes",
        "Send fewer or shorter headers, and a chunked body in chunks of five bytes or more.",
    ),
    "conflict": Explained(
        "The server's state forbids it: a running server does not exchange its model.",
        "A running server keeps its model: restart it with other settings, such as MODEL_ID or CUSTOM_HF_MODEL_ID",
        "Restart the server with other settings.",
    ),
    "body_too_large": Explained(
        f"The body has more bytes than the server reads, or more than {MAX_CONTAINERS} objects and lists. It was not "
        "read to its end, and the connection is closed.",
        "The request body is larger than 4194304 bytes. Send less at once, or raise MAX_BODY_BYTES.",
        "Send a smaller body, or raise `MAX_BODY_BYTES` and restart.",
    ),
    "unavailable": Explained(
        "The server cannot answer now, for a reason that the message gives.",
        "The device has failed or the worker has died; this process has to be replaced",
        "Wait for a new process: `serve` ends by itself with exit code 3, some seconds after `/ready` has begun to say "
        "this. The server's log has the cause.",
    ),
    "busy": Explained(
        "The request would have to wait for others, and `fail_if_busy` says that it is not to. The body has "
        "`busy: true` as well.",
        "Server is busy with another request",
        "Ask another server, ask again, or leave `fail_if_busy` out.",
    ),
    "not_ready": Explained(
        "The model is still loading. `/health` answers already; `/ready` does when loading is done.",
        "The model is still loading (Loading smollm2-135m-instruct on cpu). Try again in a few seconds.",
        "Wait for `/ready` to answer 200.",
    ),
    "overloaded": Explained(
        "As many requests are inside as the server admits, or this one waited too long for its turn; or as many bodies "
        "are on their way in, or all connections at work.",
        "32 requests are being answered already, the most that this server admits.",
        "Try again after `Retry-After` seconds, with fewer requests at once; or raise `MAX_CONCURRENT_REQUESTS`.",
    ),
    "source_coming": Explained(
        "An SAE that a request needs is being fetched, or could not be: a configured one that was not on this machine "
        "at the start, or one that the request named, as `DOWNLOAD_ON_REQUEST` allows. Others are answered.",
        "Source '20-gemmascope-res-16k' is being fetched, 0.28 GiB, for 12 s now. Ask again soon.",
        "Ask again after `Retry-After` seconds. `/v1/capabilities` lists configured ones that are still to come "
        "(`sources_coming`).",
    ),
    "out_of_memory": Explained(
        "The device ran out of memory on this request. Its caches were freed; other requests go on.",
        "The device ran out of memory.",
        "Try again with shorter or fewer prompts, or lower `TOKEN_LIMIT` and `MAX_TOKENS`.",
    ),
    "engine_failed": Explained(
        "A fault on our side while the model ran, or a result with numbers that JSON cannot say (NaN, infinity).",
        "The model produced a number that is not finite, so there is no answer",
        "Look for the request id in the server's log. With steering, a smaller strength may help; where float16 "
        "overflows, another `MODEL_DTYPE`.",
    ),
    "internal": Explained(
        "A fault on our side that was not foreseen. The answer shows nothing of it.",
        f"Internal error. The server's log has it under request id {REQUEST_ID}.",
        "Look for the request id in the server's log, and report what you find there.",
    ),
    "not_found": Explained(
        "The server has no such path. Paths have no slash at their end.",
        "The server has no path '/v1/top_k'. Did you mean POST /v1/top-k?",
        "Take a path from the table of operations.",
        status=404,
    ),
    "method_not_allowed": Explained(
        "The path exists, but not for this method. The `Allow` header says which one it takes.",
        "/v1/steer is asked by POST, not by GET.",
        "Use the method of the `Allow` header.",
        status=405,
    ),
}


def classes_by_code() -> dict[str, type[InferenceError]]:
    """The error tree, code by code: the class that brought a code in."""
    found: dict[str, type[InferenceError]] = {}
    waiting: list[type[InferenceError]] = [InferenceError]
    while waiting:
        kind = waiting.pop(0)
        found.setdefault(kind.code, kind)
        waiting.extend(kind.__subclasses__())
    return found


def status_of(code: str) -> int:
    explained = EXPLAINED[code]
    return explained.status if explained.status is not None else classes_by_code()[code].status
