"""What is asked of a loaded runtime, as callers ask it, and what plain Hugging Face says to the same.

Differences are told in parts of what the numbers are sums of, so that one bound holds for all: rounding errors of a sum
of d numbers are about √d·eps of its parts where they are independent (Higham, Accuracy and Stability of Numerical
Algorithms, 2.8), those of n layers add up as √n, and a layer has about eight sums.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuronpedia_inference.checks import features, plain
from neuronpedia_inference.checks.plain import METHODS, PlainSteer
from neuronpedia_inference.checks.report import Check, Report, about
from neuronpedia_inference.domain import Numbers, Sampling, Source, Tokens, Written
from neuronpedia_inference.edits.plan import BY_METHOD, Direction, Edit, Plan
from neuronpedia_inference.errors import InferenceError, StartupError
from neuronpedia_inference.questions import Projection, TopPerToken
from neuronpedia_inference.saes.catalogue import resolve
from neuronpedia_inference.settings import EMBEDDED_MODEL_ID

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

TEXTS = ("The capital of France is", "Once upon a time, there was a cat who", "Yes.")
"""Of different length, so that what is merged is padded."""
N_TOKENS = 4
N_CANDIDATES = 5
N_FEATURES = 8
NOT_HERE = "it is not on this machine yet"
LOOSEST_BOUND = 0.05
"""In 16 bits errors grow until only gross ones count."""
KNOWN = {EMBEDDED_MODEL_ID: (-7.79, -13.19, -12.31, -12.77, -3.16)}
"""h·v of the first text from the second token on, by models whose numbers are on record."""
KNOWN_TOLERANCE = 0.25
"""Absolute; in bfloat16 the answers on record differ by up to 0.12."""


async def verify(runtime: Runtime) -> Report:
    """Every comparison. One that the runtime does not answer has failed."""
    asked = await _Asked.of(runtime)
    questions = [("capture", asked.capture(TEXTS))]
    questions += [(f"features of {source.name}", asked.features(source)) for source in runtime.shelf.sources]
    questions += [(f"steered, {method}", asked.steered(method)) for method in METHODS]
    questions += [("effect", asked.effect()), ("merged", asked.merged()), ("streamed", asked.streamed())]
    missing = [Check(f"features of {name}", 0.0, asked.bound, "", NOT_HERE) for name in runtime.shelf.coming]
    found = [await _answered(runtime, name, question) for name, question in questions]
    return Report(about(runtime.model), [*found, *missing])


async def _answered(runtime: Runtime, name: str, question: Awaitable[Check]) -> Check:
    """Computed for this question, and not taken from what another has left."""
    await runtime.forget()
    try:
        return await question
    except InferenceError as exc:
        return Check(name, math.inf, 0.0, f"there is no answer: {exc.message}")


async def self_test(runtime: Runtime) -> None:
    """The few comparisons before a first request: one text read, one token steered. Raises StartupError, one line."""
    try:
        await runtime.forget()
        asked = await _Asked.of(runtime, n_tokens=1)
        await asked.known()
        rows = await asked.three_rows()
        for check in (
            await asked.capture(TEXTS[:1], in_the_middle=True),
            _effect(rows, asked.bound),
            await asked.added(rows[2]),
        ):
            if not check.passed:
                raise StartupError(f"Self-test failed: {check.where if check.name == 'effect' else check.line()}")
    except InferenceError as exc:
        raise StartupError(f"Self-test failed: {exc.message}") from exc


class _Asked:
    """One runtime, and its model without it."""

    def __init__(self, runtime: Runtime, prompts: Sequence[Tokens], bound: float, n_tokens: int) -> None:
        self.bound = bound
        self._runtime = runtime
        self._prompts = prompts
        self._n_tokens = n_tokens
        self._residuals_of: dict[tuple[int, ...], list[Tensor]] = {}
        self._projections_of: dict[tuple[str, int], list[Numbers]] = {}
        self._n_layers = runtime.model.n_layers
        self._layer = runtime.model.n_layers // 2
        self._hook = f"blocks.{self._layer}.hook_resid_post"
        self._vector = _direction(runtime.model.d_model)

    @classmethod
    async def of(cls, runtime: Runtime, n_tokens: int = N_TOKENS) -> _Asked:
        """n_tokens: that are generated."""
        eps = torch.finfo(getattr(torch, runtime.model.dtype)).eps
        bound = min(LOOSEST_BOUND, 8 * eps * math.sqrt(runtime.model.n_layers * runtime.model.d_model))
        return cls(runtime, [runtime.tokenize(text, "once") for text in TEXTS], bound, n_tokens)

    # What is read

    async def known(self) -> None:
        """Raises StartupError where a model on record gives other numbers than are on record."""
        on_record = KNOWN.get(self._runtime.model.name)
        if on_record is None:
            return
        found = (await self._projections(1, self._hook))[0][1:].tolist()
        if not all(abs(a - b) <= KNOWN_TOLERANCE for a, b in zip(found, on_record, strict=True)):
            raise StartupError(f"Self-test failed: {self._hook} gave {_few(found)}, on record are {_few(on_record)}")

    async def capture(self, texts: Sequence[str], *, in_the_middle: bool = False) -> Check:
        """h·v before the first block and after the first, the middle and the last one, of texts that share a pass.

        in_the_middle: there only.
        """
        worst = _Worst()
        prompts = self._prompts[: len(texts)]
        layers = sorted({0, self._layer, self._n_layers - 1})
        hooks = [("blocks.0.hook_resid_pre", 0), *((f"blocks.{n}.hook_resid_post", n + 1) for n in layers)]
        hooks = [(self._hook, self._layer + 1)] if in_the_middle else hooks
        expected = [await self._residuals(prompt) for prompt in prompts]
        v = torch.tensor(self._vector)
        for hook, place in hooks:
            found = await self._projections(len(prompts), hook)
            for prompt, row, of_text in zip(prompts, found, expected, strict=True):
                h = of_text[place].float().cpu()
                apart = (torch.as_tensor(row) - h @ v).abs() / (h.norm(dim=1) * v.norm())
                worst.see(apart, lambda at, hook=hook, prompt=prompt: f"{hook}, token {at} of {len(prompt)}")
        return worst.check("capture", self.bound)

    async def features(self, source: Source) -> Check:
        """The strongest features at every token of texts that share a pass, and their numbers."""
        name = f"features of {source.name}"
        spec = next(spec for spec in resolve(self._runtime.settings).specs if spec.name == source.name)
        side, _, place = source.hook.rpartition(".")
        if spec.folder is None or place not in ("hook_resid_pre", "hook_resid_post"):
            why = "it is in no folder" if spec.folder is None else f"{place} is no block's input or output"
            return Check(name, 0.0, self.bound, "", why)
        written = features.written(spec.folder)
        if isinstance(written, str):
            return Check(name, 0.0, self.bound, "", written)
        worst = _Worst()
        k = min(N_FEATURES, source.n_features)
        found = await self._runtime.ask(TopPerToken(self._prompts, source, k))
        for prompt, top in zip(self._prompts, found, strict=True):
            x = (await self._residuals(prompt))[source.layer + (place == "hook_resid_post")]
            apart = _features_apart(written, x, torch.as_tensor(top.indices), torch.as_tensor(top.values), self.bound)
            worst.see(apart, lambda at, prompt=prompt: f"{side}, token {at} of {len(prompt)}")
        return worst.check(name, self.bound)

    # What is written

    async def three_rows(self) -> list[Written]:
        """The first text plain, with nothing added and with much added, in one batch."""
        steer = await self._steer(METHODS[0])
        plans = [None, _plan(steer, 0.0), _plan(steer)]
        return await _whole(self._generate(self._prompts[0], plans, stream=False))

    async def effect(self) -> Check:
        return _effect(await self.three_rows(), self.bound)

    async def added(self, row: Written) -> Check:
        """Tokens and log-probabilities of the last of `three_rows`."""
        worst = _Worst()
        await self._compare(worst, self._prompts[0], await self._steer(METHODS[0]), row)
        return worst.check(f"steered, {METHODS[0]}", self.bound)

    async def steered(self, method: str) -> Check:
        """Tokens and log-probabilities of one steered text."""
        worst = _Worst()
        prompt, steer = self._prompts[0], await self._steer(method)
        (row,) = await _whole(self._generate(prompt, [_plan(steer)], stream=False))
        await self._compare(worst, prompt, steer, row)
        return worst.check(f"steered, {method}", self.bound)

    async def merged(self) -> Check:
        """Texts of different length, steered by every method and not at all, at once."""
        worst = _Worst()
        steers = [None, *[await self._steer(method) for method in METHODS]]
        plans = [None if steer is None else _plan(steer) for steer in steers]
        at_once = [_whole(self._generate(prompt, plans, stream=False)) for prompt in self._prompts]
        for prompt, rows in zip(self._prompts, await asyncio.gather(*at_once), strict=True):
            for steer, row in zip(steers, rows, strict=True):
                await self._compare(worst, prompt, steer, row)
        return worst.check("merged", self.bound)

    async def streamed(self) -> Check:
        """A steered text as it is written: its pieces are what the text is, which is what plain Hugging Face gives."""
        worst = _Worst()
        prompt, steer = self._prompts[1], await self._steer(METHODS[0])
        (row,) = await _whole(self._generate(prompt, [_plan(steer)], stream=True))
        await self._compare(worst, prompt, steer, row)
        text = row.text + row.ending
        if text != self._runtime.decode(row.token_ids):
            return Check("streamed", math.inf, self.bound, f"the text {text!r} is not that of its tokens")
        return worst.check("streamed", self.bound)

    # Inside

    async def _projections(self, n_prompts: int, hook: str) -> list[Numbers]:
        """h·v of the first so many prompts in one pass, asked once."""
        if (hook, n_prompts) not in self._projections_of:
            found = await self._runtime.ask(Projection(self._prompts[:n_prompts], hook, self._vector))
            self._projections_of[hook, n_prompts] = found
        return self._projections_of[hook, n_prompts]

    async def _residuals(self, prompt: Tokens) -> list[Tensor]:
        """[pos, width] before every block and after the last, made once for each text."""
        ids = tuple(prompt.ids)
        if ids not in self._residuals_of:
            found = await self._runtime.with_model(lambda model: plain.residuals(model, self._n_layers, ids))
            self._residuals_of[ids] = found
        return self._residuals_of[ids]

    async def _steer(self, method: str) -> PlainSteer:
        """As much as there is: the size of h at the first text's last token, or a cap below what it has along v."""
        h = (await self._residuals(self._prompts[0]))[self._layer + 1][-1].float().cpu()
        size = float(h.norm())
        along = float(h @ torch.tensor(self._vector))
        amounts = {"SIMPLE_ADDITIVE": size, "ORTHOGONAL_DECOMP": 3.0, "PROJECTION_CAP": along - size}
        return PlainSteer(self._layer, method, amounts[method], self._vector)

    def _generate(self, prompt: Tokens, plans: Sequence[Plan | None], *, stream: bool) -> AsyncIterator[Any]:
        sampling = Sampling(self._n_tokens, n_logprobs=N_CANDIDATES)
        return self._runtime.generate(prompt, plans, sampling, stream=stream)

    async def _compare(self, worst: _Worst, prompt: Tokens, steer: PlainSteer | None, row: Written) -> None:
        """Every token's log-probability, those of the likeliest, and whether the token is the likeliest."""
        ids = (*prompt.ids, *row.token_ids)
        logits = await self._runtime.with_model(lambda model: plain.next_tokens(model, self._n_layers, ids, steer))
        logits = logits[len(prompt) - 1 : -1].cpu()
        size = logits.abs().amax(-1).clamp(min=1.0)
        expected = logits.log_softmax(-1)
        drawn = expected.gather(1, torch.tensor(row.token_ids)[:, None])[:, 0]
        apart = (torch.tensor([one.logprob for one in row.logprobs]) - drawn).abs()
        likeliest = expected.topk(N_CANDIDATES).values
        told = torch.tensor([[logprob for _, logprob in one.top] for one in row.logprobs])
        apart = torch.maximum(apart, (told - likeliest).abs().amax(-1))
        apart = torch.maximum(apart, likeliest[:, 0] - drawn) / size
        what = "unsteered" if steer is None else f"{steer.method} at {self._hook}"
        worst.see(apart, lambda at: f"new token {at} after {len(prompt)}, {what}")


def _effect(rows: Sequence[Written], bound: float) -> Check:
    """Adding nothing changes nothing, adding much changes what comes next: without that nothing else says much."""
    plain, nothing, much = (row.logprobs[0].logprob for row in rows)
    if not all(map(math.isfinite, (plain, nothing, much))):
        told = f"log-probabilities are not finite: {plain}, {nothing}, {much}"
    elif abs(plain - nothing) > bound * max(1.0, abs(plain)):
        told = f"steering by nothing changed {plain:.4f} to {nothing:.4f}"
    elif rows[0].token_ids[0] == rows[2].token_ids[0] and math.isclose(plain, much, rel_tol=1e-3):
        told = f"steering has no effect on the next token ({plain:.4f})"
    else:
        return Check("effect", 0.0, 0.0, "the next token")
    return Check("effect", math.inf, 0.0, told)


class _Worst:
    """The largest difference so far, and where it is."""

    def __init__(self) -> None:
        self._difference = 0.0
        self._where = ""

    def see(self, apart: Tensor, where: Any) -> None:
        """apart: [pos]; where: from a position to words."""
        apart = torch.where(apart.isnan(), torch.inf, apart.float())
        at = int(apart.argmax())
        if not self._where or float(apart[at]) > self._difference:
            self._difference, self._where = float(apart[at]), where(at)

    def check(self, name: str, bound: float) -> Check:
        return Check(name, self._difference, bound, self._where)


def _features_apart(sae: features.WrittenSae, x: Tensor, indices: Tensor, values: Tensor, bound: float) -> Tensor:
    """[pos]: the largest difference of the k strongest, in parts of what they are sums of.

    Features within rounding of their threshold may fire or not.
    """
    acts, edge, made_of = sae.activations(x)
    sure = edge > bound * made_of
    at = [whole.gather(1, indices) for whole in (acts, made_of, sure)]
    apart = (torch.where(at[2], (values - at[0]).abs(), 0.0) / at[1].clamp(min=1e-30)).amax(-1)
    others = torch.where(sure, acts, 0.0).scatter(1, indices, 0.0)
    left_out = (others - values.amin(-1, keepdim=True)).clamp(min=0.0) / made_of.clamp(min=1e-30)
    return torch.maximum(apart, left_out.amax(-1))


async def _whole(events: AsyncIterator[tuple[Written, ...]]) -> list[Written]:
    """Everything that a generation gave, row by row."""
    rows: list[list[Written]] = []
    async for event in events:
        rows = rows or [[] for _ in event]
        for row, new in zip(rows, event, strict=True):
            row.append(new)
    return [
        Written(
            "".join(new.text for new in row),
            tuple(token for new in row for token in new.token_ids),
            tuple(logprob for new in row for logprob in new.logprobs),
            ending="".join(new.ending for new in row),
        )
        for row in rows
    ]


def _plan(steer: PlainSteer, coefficient: float | None = None) -> Plan:
    hook = f"blocks.{steer.layer}.hook_resid_post"
    amount = steer.coefficient if coefficient is None else coefficient
    return Plan((Edit(BY_METHOD[steer.method], Direction(hook, tuple(steer.vector)), amount),))


def _direction(width: int) -> list[float]:
    """A fixed vector of length about 1 with no special relation to any model."""
    return [math.sin(1.0 + 0.7 * i) / math.sqrt(width / 2) for i in range(width)]


def _few(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in islice(values, 3))
