"""What chats and completions ask for alike: a model with its variant, a plan, and how to draw."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from neuronpedia_inference.completion import Completion
from neuronpedia_inference.domain import Sampling, Tokens, Written
from neuronpedia_inference.edits.plan import Plan
from neuronpedia_inference.errors import InferenceError, InvalidRequest, StartupError, UnknownModel, unknown_name
from neuronpedia_inference.observability import request_id
from neuronpedia_inference.operations.edits import checked_plan, plan_of
from neuronpedia_inference.operations.judging import Judging, longest
from neuronpedia_inference.operations.receipts import Account
from neuronpedia_inference.operations.steer import story_of
from neuronpedia_inference.operations.story import Story
from neuronpedia_inference.operations.watching import watch_plan
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.openai import Completing
from neuronpedia_inference.schemas.openai_answers import Accounted

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime
    from neuronpedia_inference.variants import Variant

SEED_BITS = 63
AT_THE_ADDRESS = "its clients speak HTTP: they ask at the web address"
"""Why these operations are no Modal methods."""


@dataclass(frozen=True)
class Heading:
    """What every answer and event begins with."""

    model: str
    kind: str
    created: int = field(default_factory=lambda: int(time.time()))
    request: str = field(default_factory=lambda: request_id() or secrets.token_hex(8))

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.request}"


def variant_of(name: str | None, rt: Runtime) -> Variant | None:
    """What a model's name asks for beside the model. Raises UnknownModel."""
    if name is None or name in rt.model.known_names:
        return None
    base, _, variant = name.rpartition("+")
    if base in rt.model.known_names and variant in rt.variants:
        return rt.variants[variant]
    raise UnknownModel(unknown_name("model", name[:80], model_ids(rt)))


async def check_variants(rt: Runtime) -> None:
    """At the start of a door that serves them. Raises StartupError, naming the variant that cannot be honoured."""
    for variant in rt.variants.values():
        try:
            await checked_plan(variant.steering, rt)
        except InferenceError as exc:
            raise StartupError(f"VARIANTS: {variant.name}: {exc.message}") from None


def model_ids(rt: Runtime) -> list[str]:
    """The served model, then its variants."""
    return [rt.model.id, *(f"{rt.model.id}+{name}" for name in rt.variants)]


def model_id(variant: Variant | None, rt: Runtime) -> str:
    return rt.model.id if variant is None else f"{rt.model.id}+{variant.name}"


def steered(request: Completing, variant: Variant | None, rt: Runtime, *, skip_special_tokens: bool) -> Plan | None:
    """The edits of the variant, then those of the request. Raises InvalidRequest and UnknownSource."""
    first = None if variant is None else variant.steering
    return plan_of(request, rt, first=first, skip_special_tokens=skip_special_tokens)


@dataclass(frozen=True)
class Writing:
    """The texts of one prompt."""

    story: Story
    steps: AsyncIterator[tuple[Written, ...]]
    """Those of the story; where that is asked for, its rows are judged at the last."""
    account: Account | None
    """Of what they depend on, where that is asked for."""

    @property
    def accounted(self) -> Accounted | None:
        """Once all is written."""
        receipt = None if self.account is None else self.account.receipt()
        return None if receipt is None else Accounted.model_construct(receipt=receipt)


async def begun(
    operation: str,
    prompt: Tokens,
    request: Completing,
    plan: Plan | None,
    sampling: Sampling,
    rt: Runtime,
    *,
    stream: bool,
) -> Writing:
    """`n` rows, each with a seed of its own. Raises every 4xx and 503."""
    watch = request.watch or ()
    ahead = partial(longest, n_rows=request.n, n_tokens=sampling.max_new_tokens, rt=rt)
    wanted = Completion(
        prompt,
        [plan] * request.n,
        sampling,
        seeds=[sampling.seed + place for place in range(request.n)],
        reads=watch_plan(watch, request.rules or (), rt),
        proves=request.judge or request.receipt,
        then=ahead if request.judge else None,
    )
    with reproducibly(request.reproducible):
        started = await rt.complete(wanted, stream=stream)
    story = story_of("", started, wanted, rt, keeps_ending=False, watch=watch)
    drawn = request.model_copy(update={"seed": sampling.seed})  # told, so that it can be drawn again
    account = await Account.of(operation, drawn, story, rt) if request.receipt else None
    steps = Judging(story, rt, reproducible=request.reproducible) if request.judge else story
    return Writing(story, steps, account)


def sampling_of(request: Completing, rt: Runtime, *, max_new_tokens: int, n_logprobs: int) -> Sampling:
    """Raises InvalidRequest."""
    biases = tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items())
    unknown = next((token for token, _ in biases if token >= rt.model.vocab_size), None)
    if unknown is not None:
        raise InvalidRequest(f"logit_bias: there is no token {unknown}: ids are 0 to {rt.model.vocab_size - 1}.")
    if len({token for token, _ in biases}) < len(biases):
        raise InvalidRequest("logit_bias: a token is given twice: once will do")
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=request.temperature,
        seed=secrets.randbits(SEED_BITS) if request.seed is None else request.seed,
        n_logprobs=n_logprobs,
        top_p=request.top_p,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=biases,
        stop=tuple(request.stop or ()),
    )
