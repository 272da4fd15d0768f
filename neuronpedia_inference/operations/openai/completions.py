"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.domain import Likelihood, TokenLogprob, Tokens, Written
from neuronpedia_inference.edits.plan import Plan
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations.openai.asking import (
    AT_THE_ADDRESS,
    Heading,
    Writing,
    begun,
    model_id,
    sampling_of,
    steered,
    variant_of,
)
from neuronpedia_inference.operations.openai.reading import WithoutSpecial, read
from neuronpedia_inference.operations.openai.telling import (
    Chained,
    Spread,
    finish_of,
    interpreted,
    judged,
    least,
    usage,
)
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.score import likelihoods
from neuronpedia_inference.operations.story import Transcript
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.common import Wire
from neuronpedia_inference.schemas.openai import MAX_CHOICES_IN_ALL, CompletionRequest
from neuronpedia_inference.schemas.openai_answers import (
    Accounted,
    CompletionResponse,
    FinishReason,
    TextChoice,
    TextLogprobs,
    Usage,
)

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


NAME = "completions"


async def completions(request: CompletionRequest, rt: Runtime) -> CompletionResponse:
    """Raises InvalidRequest, UnknownModel, UnknownSource, UnknownPoint, LimitExceeded."""
    texts = await _begun(request, rt, stream=False)
    stories = [Spread(one.writing.steps, one.add, tuple) for one in texts.prompts if one.writing is not None]
    async with aclosing(Chained(stories)) as written:
        async for _ in written:
            pass
    return texts.response()


async def completion_events(request: CompletionRequest, rt: Runtime) -> AsyncIterator[Wire]:
    """As `completions`, in what is new, prompt by prompt. Raises the same before it returns."""
    texts = await _begun(request, rt, stream=True)
    begun_texts = [(one, one.writing) for one in texts.prompts if one.writing is not None]
    last = len(begun_texts) - 1
    return Chained(
        [
            Spread(writing.steps, partial(texts.events, one), partial(texts.last, one, counts=place == last))
            for place, (one, writing) in enumerate(begun_texts)
        ]
    )


class _Text:
    """One text, as it is written."""

    def __init__(self, index: int, row: Transcript, begins: str) -> None:
        """begins: what it shows of its prompt."""
        self.index = index
        self.row = row
        self.whole = begins
        self.logprobs: list[TokenLogprob] = []
        self.n_told = len(begins)
        """Characters of the tokens whose log-probabilities have been told."""
        self._reader = WithoutSpecial()

    def add(self, written: Written) -> str:
        """What is new."""
        read(self._reader, written.text, written.special)
        news = self._reader.said.taken().content
        self.whole += news
        self.logprobs += written.logprobs
        return news


class _Prompt:
    """The texts that go on from one prompt."""

    def __init__(
        self, tokens: Tokens, writing: Writing | None, texts: Sequence[_Text], own: Sequence[TokenLogprob | None] = ()
    ) -> None:
        """writing: None where nothing is to be generated. own: log-probabilities of the prompt's tokens, to be told."""
        self.tokens = tokens
        self.writing = writing
        self.texts = texts
        self.own = own

    def add(self, news: Sequence[Written]) -> Iterable[Any]:
        for text, written in zip(self.texts, news, strict=True):
            text.add(written)
        return ()


class _Texts:
    """All texts of one request."""

    def __init__(self, request: CompletionRequest, model: str, prompts: Sequence[_Prompt]) -> None:
        self.prompts = prompts
        self._request = request
        self._heading = Heading(model, "cmpl")

    def events(self, prompt: _Prompt, news: Sequence[Written]) -> Iterable[CompletionResponse]:
        """What is new in each text of a prompt, and behind its last piece why it ended."""
        for text, written in zip(prompt.texts, news, strict=True):
            said, row = text.add(written), text.row
            has_numbers = row.watched is not None and written.numbers is not None
            told = interpreted(row, newest=True) if has_numbers or written.rule is not None else None
            if said or written.logprobs or told:
                yield self._event([_choice(text, said, self._logprobs(text, written.logprobs), told)])
            if written.finish_reason is not None:
                yield self._event([_choice(text, "", None, None, finish_of(row))])

    def last(self, prompt: _Prompt, *, counts: bool) -> Iterable[CompletionResponse]:
        """How well each text of a prompt holds, and at the end of all the receipt and the event that counts the tokens,
        where they are asked for."""
        for text in prompt.texts:
            if text.row.judge is not None:
                yield self._event([_choice(text, "", None, judged(text.row))])
        if counts and self._accounted is not None:
            yield self._event([], accounted=self._accounted)
        options = self._request.stream_options
        if counts and options is not None and options.include_usage:
            yield self._event([], self._usage())

    def response(self) -> CompletionResponse:
        texts = [(prompt, text) for prompt in self.prompts for text in prompt.texts]
        return self._event([self._whole(*pair) for pair in texts], self._usage(), self._accounted)

    @property
    def _accounted(self) -> Accounted | None:
        """Of the only text."""
        writing = self.prompts[0].writing
        return None if writing is None else writing.accounted

    def _whole(self, prompt: _Prompt, text: _Text) -> TextChoice:
        if prompt.own:
            text.n_told = 0
        logprobs = self._logprobs(text, [*prompt.own, *text.logprobs], prompt.tokens)
        return _choice(text, text.whole, logprobs, interpreted(text.row, newest=False), finish_of(text.row) or "length")

    def _usage(self) -> Usage:
        rows = [text.row for prompt in self.prompts for text in prompt.texts]
        return usage(sum(len(prompt.tokens) for prompt in self.prompts), rows)

    def _logprobs(
        self, text: _Text, found: Sequence[TokenLogprob | None], prompt: Tokens | None = None
    ) -> TextLogprobs | None:
        """None in `found`: the first token of the prompt, which nothing precedes."""
        n_top = self._request.logprobs
        if n_top is None:
            return None
        names = [one.token if one is not None else prompt.strings[0] if prompt else "" for one in found]
        offsets = []
        for name in names:
            offsets.append(text.n_told)
            text.n_told += len(name)
        return TextLogprobs.model_construct(
            tokens=names,
            token_logprobs=[None if one is None else least(one.logprob) for one in found],
            top_logprobs=[None if one is None else _candidates(one, n_top) for one in found] if n_top else None,
            text_offset=offsets,
        )

    def _event(
        self, choices: list[TextChoice], counted: Usage | None = None, accounted: Accounted | None = None
    ) -> CompletionResponse:
        return CompletionResponse.model_construct(
            id=self._heading.id,
            object="text_completion",
            created=self._heading.created,
            model=self._heading.model,
            choices=choices,
            usage=counted,
            interpretability=accounted,
        )


def _choice(text: _Text, said: str, logprobs: Any, told: Any, finish: FinishReason | None = None) -> TextChoice:
    return TextChoice.model_construct(
        index=text.index, text=said, logprobs=logprobs, finish_reason=finish, interpretability=told
    )


def _candidates(one: TokenLogprob, n_top: int) -> dict[str, float]:
    """The likeliest tokens by name, and the token itself."""
    return {token: least(logprob) for token, logprob in (*one.top[:n_top], (one.token, one.logprob))}


async def _begun(request: CompletionRequest, rt: Runtime, *, stream: bool) -> _Texts:
    """Raises every 4xx and 503 before it returns, and then has begun nothing."""
    prompts = _prompts(request.prompt, rt)
    _check_number(request, len(prompts), rt)
    variant = variant_of(request.model, rt)
    plan = steered(request, variant, rt, skip_special_tokens=False)
    n_logprobs = 0 if request.logprobs is None else max(1, request.logprobs)
    sampling = sampling_of(request, rt, max_new_tokens=request.max_tokens, n_logprobs=n_logprobs)
    own = await _own_logprobs(request, prompts, plan, rt)
    found: list[_Prompt] = []
    async with AsyncExitStack() as if_refused:
        for tokens, of_prompt in zip(prompts, own, strict=True):
            writing = None
            rows = [Transcript("", has_logprobs=False) for _ in range(request.n)]
            if request.max_tokens:
                writing = await begun(NAME, tokens, request, plan, sampling, rt, stream=stream)
                if_refused.push_async_callback(writing.story.aclose)
                rows = list(writing.story.rows)
            begins = _text_of(tokens, rt) if request.echo else ""
            texts = [_Text(index, row, begins) for index, row in enumerate(rows, len(found) * request.n)]
            found.append(_Prompt(tokens, writing, texts, of_prompt))
        if_refused.pop_all()
    return _Texts(request, model_id(variant, rt), found)


async def _own_logprobs(
    request: CompletionRequest, prompts: Sequence[Tokens], plan: Plan | None, rt: Runtime
) -> list[list[TokenLogprob | None]]:
    """Of every prompt's tokens, None for the first; nothing unless they are asked for. Raises every 4xx and 503."""
    n_top = request.logprobs
    if n_top is None or not request.echo:
        if not request.max_tokens and plan is not None:
            await rt.check_steering(plan)
        return [[] for _ in prompts]
    if plan is not None:
        await rt.check_steering(plan)
    texts = [tokens for tokens in prompts if len(tokens) > 1]
    question = likelihoods(texts, [1] * len(texts), rt, n_top=n_top, is_edited=plan is not None)
    with reproducibly(request.reproducible):
        found = iter(await rt.ask(question, plan, [0] * len(texts)) if texts else [])
    return [[None, *(_told(tokens, next(found), rt) if len(tokens) > 1 else [])] for tokens in prompts]


def _told(tokens: Tokens, found: Likelihood, rt: Runtime) -> list[TokenLogprob]:
    """Of all tokens but the first."""
    tops = zip(found.top_ids.tolist(), found.top.tolist(), strict=True)
    return [
        TokenLogprob(name, logprob, tuple((rt.token_string(i), value) for i, value in zip(*top, strict=True)))
        for name, logprob, top in zip(tokens.strings[1:], found.logprobs.tolist(), tops, strict=True)
    ]


def _prompts(prompt: str | list[str] | list[int] | list[list[int]], rt: Runtime) -> list[Tokens]:
    """Raises InvalidRequest or LimitExceeded."""
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    several: Any = [prompt] if is_one else prompt
    return [rt.tokenize(one, "natural") if isinstance(one, str) else _tokens(one, rt) for one in several]


def _tokens(ids: Sequence[int], rt: Runtime) -> Tokens:
    unknown = next((one for one in ids if one >= rt.model.vocab_size), None)
    if unknown is not None:
        raise InvalidRequest(f"prompt: there is no token {unknown}: ids are 0 to {rt.model.vocab_size - 1}.")
    return rt.tokens(ids)


def _check_number(request: CompletionRequest, n_prompts: int, rt: Runtime) -> None:
    """Raises LimitExceeded for more than could ever be inside together, InvalidRequest for a receipt of not one."""
    if request.receipt and (n_prompts > 1 or not request.max_tokens):
        what = f"there are {n_prompts} prompts" if n_prompts > 1 else "max_tokens 0 writes none"
        raise InvalidRequest(f"receipt: is of one text that is written, and {what}. Ask for one, or leave it out.")
    most = rt.settings.max_concurrent_requests
    if n_prompts > most:
        raise LimitExceeded(
            f"prompt: {n_prompts} prompts are too many, this server takes {most} at once. "
            "Send fewer, or raise MAX_CONCURRENT_REQUESTS."
        )
    if n_prompts * request.n > MAX_CHOICES_IN_ALL:
        raise LimitExceeded(
            f"prompt: {n_prompts} prompts with n {request.n} are {n_prompts * request.n} texts, the most is "
            f"{MAX_CHOICES_IN_ALL}. Send fewer."
        )


def _text_of(tokens: Tokens, rt: Runtime) -> str:
    return rt.decode([id_ for id_, is_special in zip(tokens.ids, tokens.is_special, strict=True) if not is_special])


COMPLETIONS = Operation(
    name=NAME,
    path="/v1/completions",
    request=CompletionRequest,
    response=CompletionResponse,
    summary="Continue texts, steered, in OpenAI's shapes",
    run=completions,
    stream=completion_events,
    dialect="openai",
    off_modal_because=AT_THE_ADDRESS,
)
