"""score: how likely continuations of a prompt are, under any steering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import ChatMessage, Likelihood, Tokens
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations.edits import checked_plan, skips_special_tokens
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.questions.likelihoods import Likelihoods
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.score import ContinuationScore, ScoreRequest, ScoreResponse
from neuronpedia_inference.schemas.steer import NPSteerChatMessage
from neuronpedia_inference.schemas.watch import NPLogprobTop

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

Behind = Callable[[str], Tokens]
"""The whole text, with this behind its prompt."""


async def score(request: ScoreRequest, rt: Runtime) -> ScoreResponse:
    """Raises InvalidRequest, UnknownSource, UnknownPoint, LimitExceeded."""
    if request.model is not None:
        check_model(request.model, rt)
    chat = _chat(request)
    skips = skips_special_tokens(request, is_chat=chat is not None)
    plan = await checked_plan(request, rt, skip_special_tokens=skips)
    texts, n_given = _texts(request, chat, rt)
    question = likelihoods(texts, n_given, rt, n_top=request.n_logprobs or 0, is_edited=plan is not None)
    with reproducibly(request.reproducible):
        behind = [len(text) - 1 - n for text, n in zip(texts, n_given, strict=True)]
        found = await rt.ask(question, plan, behind)
    results = [_scored(*one, rt) for one in zip(texts, n_given, found, strict=True)]
    return ScoreResponse.model_construct(results=results)


def likelihoods(
    texts: Sequence[Tokens], n_given: Sequence[int], rt: Runtime, *, n_top: int = 0, is_edited: bool = False
) -> Likelihoods:
    """The question, of this model. Raises LimitExceeded for more numbers than one answer may have."""
    n_numbers = (1 + 2 * n_top) * (sum(map(len, texts)) - sum(n_given))
    most = rt.settings.max_result_values
    if n_numbers > most:
        raise LimitExceeded(
            f"The answer would have {n_numbers} numbers, the most is {most}. Score less, ask for fewer n_logprobs, or "
            "raise MAX_RESULT_VALUES."
        )
    return Likelihoods(texts, n_given, rt.model.n_layers - 1, rt.model.vocab_size, n_top, is_edited)


def _chat(request: ScoreRequest) -> list[ChatMessage] | None:
    """Its messages; None where the prompt is no chat."""
    if isinstance(request.prompt, str):
        return None
    messages = [one for one in request.prompt if isinstance(one, NPSteerChatMessage)]
    return [ChatMessage(one.role, one.content) for one in messages] or None


def _texts(request: ScoreRequest, chat: Sequence[ChatMessage] | None, rt: Runtime) -> tuple[list[Tokens], list[int]]:
    """Every whole text, and how many of its tokens are the prompt's alone. Raises InvalidRequest."""
    given, behind = _prompt(request, chat, rt)
    if not given.ids:
        raise InvalidRequest("prompt: has no tokens, so there is nothing to go on from. Send at least one.")
    texts: list[Tokens] = []
    for place, continuation in enumerate(request.continuations):
        if not continuation:
            raise InvalidRequest(f"continuations.{place}: is empty, so there is nothing to score. Leave it out.")
        ids = [] if isinstance(continuation, str) else continuation
        text = behind(continuation) if isinstance(continuation, str) else rt.tokens([*given.ids, *ids])
        if not 0 < _n_shared(given, text) < len(text):
            raise InvalidRequest(
                f"continuations.{place}: leaves the prompt no token of its own, or adds none. Send ids of tokens, "
                "which are taken as they are."
            )
        texts.append(text)
    return texts, [_n_shared(given, text) for text in texts]


def _prompt(request: ScoreRequest, chat: Sequence[ChatMessage] | None, rt: Runtime) -> tuple[Tokens, Behind]:
    """Its tokens, and how a text is put behind it."""
    prompt = request.prompt
    if chat is not None:
        rendered, given = rt.render_chat(chat)
        return given, lambda text: rt.tokenize(rendered + text, "never")
    if isinstance(prompt, str):
        return rt.tokenize(prompt, "once"), lambda text: rt.tokenize(prompt + text, "once")
    given = rt.tokens([one for one in prompt if isinstance(one, int)])
    return given, lambda text: rt.tokens([*given.ids, *rt.tokenize(text, "never").ids])


def _n_shared(given: Tokens, text: Tokens) -> int:
    """Tokens from the first on that are alike."""
    pairs = enumerate(zip(given.ids, text.ids, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(given), len(text)))


def _scored(text: Tokens, n_given: int, found: Likelihood, rt: Runtime) -> ContinuationScore:
    def top(place: int) -> list[NPLogprobTop]:
        pairs = zip(found.top_ids[place].tolist(), found.top[place].tolist(), strict=True)
        return [NPLogprobTop(token=rt.token_string(i), logprob=value) for i, value in pairs]

    return ContinuationScore.model_construct(
        logprob=float(found.logprobs.sum()),
        logprob_per_token=float(found.logprobs.mean()),
        is_greedy=bool(found.is_likeliest.all()),
        tokens=list(text.strings[n_given:]),
        token_ids=list(text.ids[n_given:]),
        logprobs=found.logprobs.tolist(),
        likeliest=Rows(len(found.logprobs), top) if found.top.shape[1] else None,
        begins_at=n_given,
    )


SCORE = Operation(
    name="score",
    path="/v1/score",
    request=ScoreRequest,
    response=ScoreResponse,
    summary="How likely continuations of a prompt are, token by token, under any steering",
    run=score,
)
