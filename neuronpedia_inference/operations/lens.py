"""lens/prompt: what the model would say behind each of its blocks, at every token (contract 4.5)."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Generator, Sequence
from typing import TYPE_CHECKING

from neuronpedia_inference.completion import Completion
from neuronpedia_inference.domain import ChatMessage, Lens, Sampling, Tokens
from neuronpedia_inference.errors import BUSY, Busy, InvalidRequest, LimitExceeded, Overloaded
from neuronpedia_inference.operations.characters import Characters, Shown
from neuronpedia_inference.operations.chat_template import ANSWERS
from neuronpedia_inference.operations.lens_frames import Asked, Frame, Frames, Prompt, Span
from neuronpedia_inference.operations.lens_steering import steering_plan
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.schemas.lens import LensPromptRequest, LensPromptResponse
from neuronpedia_inference.watches.plan import WatchPlan
from neuronpedia_inference.watches.rules import RulePlan

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

LEAST = {"top_n": 1, "num_completion_tokens": 0, "max_seq_len": 1, "temperature": 0}
MOST_TEMPERATURE = 100


async def lens_prompt(request: LensPromptRequest, rt: Runtime) -> LensPromptResponse:
    """Raises InvalidRequest, NoJacobianLens, LimitExceeded, Busy where that is asked for, and LensFailed."""
    frames = await _frames(request, rt, stream=False)
    told = await frames.all_tokens()
    return LensPromptResponse.model_construct(
        meta=frames.meta(), tokens=Rows(len(told), lambda place: frames.token(told[place])), done=frames.done()
    )


async def lens_prompt_frames(request: LensPromptRequest, rt: Runtime) -> AsyncIterator[Frame]:
    """As `lens_prompt`, frame by frame. Every 4xx is raised before the first."""
    return await _frames(request, rt, stream=True)


async def _frames(request: LensPromptRequest, rt: Runtime, *, stream: bool) -> Frames:
    check_model(request.model, rt)
    _check(request)
    if request.fail_if_busy:
        rt.check_idle()
    available = {Lens(name): rt.watches.lens_layers(Lens(name), request.top_n) for name in request.type}
    layers = {lens: _chosen(there, request.layers) for lens, there in available.items()}
    prompt = await _prompt(request, rt)
    steering = await steering_plan(request, prompt.tokens, rt)
    reuse_len = 0 if steering is not None else _n_alike(prompt.tokens.ids, request.cached_token_ids)
    n_told = await _n_told(request, rt)
    watches = [
        rt.watches.read_by(lens, of_lens, n_told, words_only=request.filter_non_word_tokens)
        for lens, of_lens in layers.items()
    ]
    plan = WatchPlan.of(watches, read_from=reuse_len, shows_before=False)
    n_new = 0 if request.input_token_ids else request.num_completion_tokens
    sampling = Sampling(n_new, temperature=request.temperature, seed=secrets.randbits(62))
    wanted = Completion(prompt.tokens, [steering], sampling, reads=RulePlan((), (), {}, plan))
    try:
        begun = await rt.complete(wanted, stream=stream)
    except Overloaded:
        if request.fail_if_busy:
            raise Busy(BUSY) from None
        raise
    return Frames(begun.written, Asked(request, prompt, layers, plan, n_new), rt)


def _check(request: LensPromptRequest) -> None:
    """Raises InvalidRequest or LimitExceeded for what no model could do."""
    if not request.type:
        raise InvalidRequest("type: name at least one of LOGIT_LENS and JACOBIAN_LENS")
    if not request.input_token_ids and (request.prompt is None) == (request.chat is None):
        raise InvalidRequest("Exactly one of prompt and chat must be provided, or input_token_ids in their place")
    for name, least in LEAST.items():
        value = getattr(request, name)
        if value is not None and value < least:
            raise InvalidRequest(f"{name} is {value}, the least is {least}.")
    if request.temperature > MOST_TEMPERATURE:
        raise LimitExceeded(f"temperature is {request.temperature:g}, the most is {MOST_TEMPERATURE}. Lower it.")


async def _n_told(request: LensPromptRequest, rt: Runtime) -> int:
    """Tokens per block, no more than there are. Raises InvalidRequest where there are none."""
    if not request.filter_non_word_tokens:
        return min(request.top_n, rt.model.vocab_size)
    words = await rt.lenses.read_words()
    n_words = int(words.is_word.sum())
    if not n_words:
        raise InvalidRequest("filter_non_word_tokens: this model has no token that is a word. Send false.")
    return min(request.top_n, n_words)


async def _prompt(request: LensPromptRequest, rt: Runtime) -> Prompt:
    """Raises InvalidRequest, and LimitExceeded beyond LENS_TOKEN_LIMIT."""
    spans, answer = list[Span](), Span()
    if request.input_token_ids:
        tokens = rt.lenses.of_ids(request.input_token_ids, cut=request.max_seq_len)
    elif request.prompt is not None:
        tokens = rt.lenses.of_text(request.prompt, prepend_bos=request.prepend_bos, cut=request.max_seq_len)
    else:
        tokens, spans, answer = await _chat(request, rt)
    if not tokens.ids:
        raise InvalidRequest("The prompt has no tokens, so there is nothing to read. Send at least one character.")
    return Prompt(tokens, await paced(_shown(tokens, rt)), spans, answer)


async def _chat(request: LensPromptRequest, rt: Runtime) -> tuple[Tokens, list[Span], Span]:
    """The chat, what each of its tokens belongs to, and what that which follows does."""
    messages = [ChatMessage(one.role, one.content) for one in request.chat or ()]
    if not messages:
        raise InvalidRequest("chat: at least one message is required")
    rendered = await rt.lenses.of_chat(
        messages, thinks=request.enable_thinking, keeps_thinking=request.preserve_thinking, cut=request.max_seq_len
    )
    spans = [
        Span(part.message, ANSWERS if part.message is None else messages[part.message].role, None, part.section)
        for part in rendered.parts
    ]
    is_open = messages[-1].role == ANSWERS
    return rendered.tokens, spans, Span(len(messages) - 1 if is_open else None, ANSWERS, None, "content")


def _shown(tokens: Tokens, rt: Runtime) -> Generator[None, None, list[Shown]]:
    characters = Characters(rt.token_string, rt.decode)
    shown: list[Shown] = []
    for token_id in tokens.ids:
        shown += characters.push(token_id)
        yield
    return [*shown, *characters.rest()]


def _chosen(available: Sequence[int], asked: Sequence[int]) -> list[int]:
    """The last is always there."""
    wanted = {*asked, available[-1]}
    return [layer for layer in available if not asked or layer in wanted]


def _n_alike(ids: Sequence[int], known: Sequence[int]) -> int:
    pairs = enumerate(zip(ids, known, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(known)))


LENS_PROMPT = Operation(
    name="lens_prompt",
    path="/v1/lens/prompt",
    request=LensPromptRequest,
    response=LensPromptResponse,
    summary="What the model would say behind each of its blocks, at every token",
    run=lens_prompt,
    stream=lens_prompt_frames,
    dialect="ndjson",
    mirrors=False,
)
