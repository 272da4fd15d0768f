"""Proof that a container computes what it should, run after every start and every restore, before the first request."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import Sampling, Tokens
from neuronpedia_inference.errors import InferenceError, StartupError
from neuronpedia_inference.settings import EMBEDDED_MODEL_ID
from neuronpedia_inference.steering.plan import SteerPlan, SteerVector

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

PROMPT = "The capital of France is"
KNOWN = {EMBEDDED_MODEL_ID: ((-7.79, -13.19, -12.31, -12.77, -3.16), " the")}
"""Models whose answers are on record: h·v from the second token on, and the steered token."""
KNOWN_TOLERANCE = 0.25
"""Absolute; in bfloat16 the answers on record differ by up to 0.12."""
TOLERANCE = 1e-3
"""Relative; the same sums in another order differ by less, in every precision that is served."""


async def self_test(runtime: Runtime) -> None:
    """One capture and one steered token, each compared with what it must be. Raises StartupError, one line."""
    try:
        prompt = runtime.tokenize(PROMPT, "once")
        size = await _check_capture(runtime, prompt)
        await _check_steering(runtime, prompt, size)
    except InferenceError as exc:
        raise StartupError(f"Self-test failed: {exc.message}") from exc


async def _check_capture(runtime: Runtime, prompt: Tokens) -> float:
    """h·v is finite and not all zero; captured again, -h·v is its negative. Returns about the norm of the last h."""
    hook = f"blocks.{runtime.model.n_layers // 2}.hook_resid_post"
    vector = _direction(runtime.model.d_model)
    once = tuple((await runtime.projections([prompt], hook, vector))[0].tolist())
    negated = tuple((await runtime.projections([prompt], hook, [-x for x in vector]))[0].tolist())
    if not all(map(math.isfinite, once)) or not any(once):
        raise StartupError(f"Self-test failed: {hook} holds no usable numbers: {_few(once)}")
    if not all(math.isclose(a, -b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in zip(once, negated, strict=True)):
        raise StartupError(f"Self-test failed: {hook} captured twice differs: {_few(once)} and {_few(negated)}")
    known = KNOWN.get(runtime.model.name)
    if known and not all(abs(a - b) <= KNOWN_TOLERANCE for a, b in zip(once[1:], known[0], strict=True)):
        raise StartupError(f"Self-test failed: {hook} gave {_few(once[1:])}, on record are {_few(known[0])}")
    return max(100.0, abs(once[-1]) * math.sqrt(runtime.model.d_model))


async def _check_steering(runtime: Runtime, prompt: Tokens, size: float) -> None:
    """Three rows of one batch: adding nothing changes nothing, adding much changes what comes next."""
    hook = f"blocks.{runtime.model.n_layers // 2}.hook_resid_post"
    vector = tuple(_direction(runtime.model.d_model))
    plans = [None, *(SteerPlan((SteerVector(hook, vector, c),)) for c in (0.0, size))]
    completions = runtime.generate(prompt, plans, Sampling(1, n_logprobs=1), stream=False)
    async for rows in completions:
        plain, nothing, much = (row.logprobs[0].logprob for row in rows)
        if not all(map(math.isfinite, (plain, nothing, much))):
            raise StartupError(f"Self-test failed: log-probabilities are not finite: {plain}, {nothing}, {much}")
        if not math.isclose(plain, nothing, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise StartupError(f"Self-test failed: steering by nothing changed {plain:.4f} to {nothing:.4f}")
        if rows[0].token_ids == rows[2].token_ids and math.isclose(plain, much, rel_tol=TOLERANCE):
            raise StartupError(f"Self-test failed: steering has no effect on the next token ({plain:.4f})")
        known = KNOWN.get(runtime.model.name)
        if known and rows[2].text != known[1]:
            raise StartupError(f"Self-test failed: the steered token is {rows[2].text!r}, on record is {known[1]!r}")


def _direction(width: int) -> list[float]:
    """A fixed vector of length about 1 with no special relation to any model."""
    return [math.sin(1.0 + 0.7 * i) / math.sqrt(width / 2) for i in range(width)]


def _few(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in islice(values, 3))
