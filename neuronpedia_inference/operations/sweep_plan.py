"""What a sweep will write: every text, in generations that fit, with everything refused that could not be written."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.completion import Completion
from neuronpedia_inference.domain import ChatMessage, Sampling
from neuronpedia_inference.edits.plan import Feature, Plan
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations.edits import plan_of, skips_special_tokens
from neuronpedia_inference.operations.judging import longest
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.operations.steer import turns
from neuronpedia_inference.operations.watching import watch_plan
from neuronpedia_inference.pacing import Pace, paced
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.edits import SteerEdit
from neuronpedia_inference.schemas.steer import NPSteerChatMessage
from neuronpedia_inference.schemas.steering import SteerByFeature, Steering
from neuronpedia_inference.schemas.sweep import MAX_PROMPTS, MAX_SEEDS, MAX_STRENGTHS, SweepRequest, SweepTakes
from neuronpedia_inference.watches.rules import RulePlan

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

WATCHED_SHARE = 16
"""Of MAX_RESULT_VALUES one part may be watched: the numbers of all texts are held until the answer is there."""
KINDS = ("features", "edits", "steerings")
Prompt = str | list[ChatMessage]


@dataclass(frozen=True)
class Cell:
    """One text to write; without steering and strength the unsteered one."""

    prompt: int
    seed: int
    steering: int | None = None
    strength: float | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Sweep:
    """What is to be done, checked."""

    request: SweepRequest
    prompts: Sequence[Prompt]
    features: Sequence[Sequence[Feature]]
    """By steering: those whose effect is looked at."""
    generations: Sequence[Sequence[Cell]]
    """Each of one prompt."""
    reads: RulePlan | None

    @property
    def sampling(self) -> Sampling:
        """Of every text, but for its seed."""
        return Sampling(max_new_tokens=self.request.max_new_tokens, temperature=self.request.temperature)

    @property
    def plans(self) -> list[Plan | None]:
        """Of all texts, in order."""
        return [cell.plan for cells in self.generations for cell in cells]

    @cached_property
    def all_features(self) -> list[Feature]:
        return list(dict.fromkeys(feature for some in self.features for feature in some))

    def read_of(self, cell: Cell) -> Sequence[Feature]:
        """Of a text that is not steered, the features of all."""
        return self.all_features if cell.steering is None else self.features[cell.steering]

    def read_together(self, cells: Sequence[Cell]) -> list[Feature]:
        """Of any of these texts."""
        return list(dict.fromkeys(feature for cell in cells for feature in self.read_of(cell)))

    def completion(self, cells: Sequence[Cell], rt: Runtime) -> Completion:
        """Of one generation."""
        request, features = self.request, self.read_together(cells)
        return Completion(
            self.prompts[cells[0].prompt],
            [cell.plan for cell in cells],
            self.sampling,
            seeds=[cell.seed for cell in cells],
            reads=self.reads,
            proves=request.judge or request.receipt,
            then=(lambda prompt: longest(prompt, len(cells), request.max_new_tokens, rt, features))
            if request.judge
            else None,
        )


async def planned_sweep(request: SweepRequest, rt: Runtime) -> tuple[Sweep, SweepTakes]:
    """With what it takes. Raises InvalidRequest, UnknownSource, UnknownPoint and LimitExceeded."""
    if request.model is not None:
        check_model(request.model, rt)
    prompts, is_chat = _prompts(request)
    kind = _kind(request)
    _check_size(len(prompts), kind, request, rt)
    skips = skips_special_tokens(request, is_chat=is_chat)
    plans = await paced(_plans(request, kind, rt, skip_special_tokens=skips))
    features = [_features(some[0]) for some in plans]
    cells = [_cells(request, prompt, plans) for prompt in range(len(prompts))]
    at_once = rt.settings.max_rows
    generations = [some[first : first + at_once] for some in cells for first in range(0, len(some), at_once)]
    sweep = Sweep(request, prompts, features, generations, watch_plan(request.watch or (), (), rt))
    with reproducibly(request.reproducible):
        return sweep, await _takes(sweep, rt)


def _prompts(request: SweepRequest) -> tuple[Sequence[Prompt], bool]:
    """And whether it is a chat."""
    if isinstance(request.prompt, str):
        texts = [request.prompt]
    else:
        said = [one for one in request.prompt if isinstance(one, NPSteerChatMessage)]
        if said:
            return [turns(said)], True
        texts = [one for one in request.prompt if isinstance(one, str)]
    if not texts or not all(texts):
        raise InvalidRequest("prompt: needs at least one text, and none may be empty. Send at least one character.")
    if len(texts) > MAX_PROMPTS:
        raise LimitExceeded(f"prompt: {len(texts)} texts are too many, the most is {MAX_PROMPTS}. Send fewer.")
    return texts, False


def _kind(request: SweepRequest) -> str:
    """What there is a list of. Raises InvalidRequest, also where another list is empty."""
    for name, most in (("strengths", MAX_STRENGTHS), ("seeds", MAX_SEEDS)):
        if not getattr(request, name):
            raise InvalidRequest(f"{name}: is empty, so there is nothing to sweep. Give 1 to {most}.")
    given = [name for name in KINDS if getattr(request, name) is not None]
    if len(given) != 1 or not getattr(request, given[0]):
        raise InvalidRequest(f"give exactly one of {', '.join(KINDS)}, with at least one item")
    return given[0]


def _plans(
    request: SweepRequest, kind: str, rt: Runtime, *, skip_special_tokens: bool
) -> Generator[None, None, list[Sequence[Plan]]]:
    """Of every steering, one for each strength. Raises InvalidRequest, naming the field."""
    found: list[Sequence[Plan]] = []
    for place, one in enumerate(getattr(request, kind)):
        steering = _steering(one)
        plan = plan_of(steering, rt, skip_special_tokens=skip_special_tokens)
        within = f"{kind}.{place}"
        if plan is None or not _has_amount(steering):
            raise InvalidRequest(f"{within}: has no strength and no amount that strengths could multiply")
        edits = [
            replace(edit, field=f"{within}.{edit.field}" if kind == "steerings" else within) for edit in plan.edits
        ]
        by_strength: list[Plan] = []
        for strength in request.strengths:
            stronger = tuple(replace(edit, amount=edit.amount * strength) for edit in edits)
            by_strength.append(replace(plan, edits=stronger))
            yield
        found.append(by_strength)
    return found


def _steering(one: Any) -> Steering:
    """Of strength 1."""
    if isinstance(one, Steering):
        return one
    if isinstance(one, SteerEdit):
        return Steering(edits=[one])
    return Steering(features=[SteerByFeature(source=one.source, index=one.index, strength=1.0)])


def _has_amount(steering: Steering) -> bool:
    return bool(steering.features or steering.vectors or any(edit.amount is not None for edit in steering.edits or ()))


def _features(plan: Plan) -> list[Feature]:
    targets = [target for edit in plan.edits for target in edit.targets]
    return list(dict.fromkeys(target for target in targets if isinstance(target, Feature)))


def _check_size(n_prompts: int, kind: str, request: SweepRequest, rt: Runtime) -> None:
    n_steerings, n_strengths, n_seeds = len(getattr(request, kind)), len(request.strengths), len(request.seeds)
    n_texts = n_prompts * n_seeds * (1 + n_steerings * n_strengths)
    most = rt.settings.max_sweep_texts
    if n_texts > most:
        raise LimitExceeded(
            f"{n_prompts} prompts × {n_steerings} {kind} × {n_strengths} strengths × {n_seeds} seeds are {n_texts} "
            f"texts with the unsteered ones, the most is {most}. Sweep less at once, or raise MAX_SWEEP_TEXTS."
        )
    n_tokens, most = n_texts * request.max_new_tokens, rt.settings.max_sweep_tokens
    if n_tokens > most:
        raise LimitExceeded(
            f"max_new_tokens: {n_texts} texts of {request.max_new_tokens} are {n_tokens} new tokens, the most of one "
            f"sweep is {most}. Sweep less at once, ask for shorter texts, or raise MAX_SWEEP_TOKENS."
        )


def _cells(request: SweepRequest, prompt: int, plans: Sequence[Sequence[Plan]]) -> list[Cell]:
    """The unsteered ones come first."""
    plain = [Cell(prompt, seed) for seed in request.seeds]
    steered = [
        Cell(prompt, seed, place, strength, plan)
        for place, some in enumerate(plans)
        for strength, plan in zip(request.strengths, some, strict=True)
        for seed in request.seeds
    ]
    return [*plain, *steered]


async def _takes(sweep: Sweep, rt: Runtime) -> SweepTakes:
    """Raises what would be refused while it runs: for every prompt, with everything that steers it."""
    n_tokens, n_watched, pace = 0, 0, Pace()
    for cells in sweep.generations:
        await pace.give_way()
        _, prompt = await rt.checked(sweep.completion(cells, rt))
        n_tokens += len(prompt) * rt.n_prompts(prompt, [cell.plan for cell in cells])
        if sweep.reads is not None:
            n_positions = len(prompt) + sweep.request.max_new_tokens
            n_watched += n_positions * sum(_n_watched(cell, sweep.reads, rt) for cell in cells)
    most = rt.settings.max_result_values // WATCHED_SHARE
    if n_watched > most:
        raise LimitExceeded(
            f"watch: the texts of this sweep have up to {n_watched} numbers in all, the most is {most}, a part in "
            f"{WATCHED_SHARE} of MAX_RESULT_VALUES. Watch less, sweep less at once, or raise MAX_RESULT_VALUES."
        )
    n_texts = sum(map(len, sweep.generations))
    n_plain = len(sweep.prompts) * len(sweep.request.seeds)
    return SweepTakes(
        n_cells=n_texts - n_plain,
        n_plain=n_plain,
        n_rows_at_once=max(map(len, sweep.generations)),
        n_generations=len(sweep.generations),
        n_prompt_tokens=n_tokens,
        n_new_tokens=n_texts * sweep.request.max_new_tokens,
        n_watched=n_watched,
    )


def _n_watched(cell: Cell, reads: RulePlan, rt: Runtime) -> int:
    """Numbers of one position."""
    return reads.watches.n_numbers(rt.edited(cell.plan), 0 if cell.plan is None else len(cell.plan.edits))
