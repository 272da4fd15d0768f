"""sweep: the same prompts at many strengths, a few generations of many rows, judged, and the strength that is best."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from neuronpedia_inference.costs import kept_bytes
from neuronpedia_inference.edits.plan import Feature
from neuronpedia_inference.errors import Overloaded
from neuronpedia_inference.operations.judging import judge
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.steer import text_story
from neuronpedia_inference.operations.story import Story, Transcript
from neuronpedia_inference.operations.suggesting import MOST_LOST, MOST_REPEATED, Mean, suggested
from neuronpedia_inference.operations.sweep_account import SweepAccount
from neuronpedia_inference.operations.sweep_plan import Cell, Sweep, planned_sweep
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.scheduler.stay import Stay
from neuronpedia_inference.schemas.sweep import (
    SweepCell,
    SweepMean,
    SweepRequest,
    SweepResponse,
    SweepSuggestion,
    SweepTakes,
)

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

T = TypeVar("T")

AGAIN_S = 0.05
"""Between two tries of a generation that finds no room."""


async def sweep(request: SweepRequest, rt: Runtime) -> SweepResponse:
    """Raises InvalidRequest, UnknownSource, UnknownPoint, LimitExceeded, and Overloaded where there is no room."""
    async with aclosing(await sweep_events(request, rt)) as events:
        found = [event async for event in events]
    return SweepResponse.model_construct(
        takes=found[0].takes,
        cells=[cell for event in found for cell in event.cells],
        default=[cell for event in found for cell in event.default],
        suggested=found[-1].suggested,
        receipt=found[-1].receipt,
    )


async def sweep_events(request: SweepRequest, rt: Runtime) -> Sweeping:
    """What it takes, every text by itself, and what is suggested. Raises every 4xx and 503 before it returns."""
    planned, takes = await planned_sweep(request, rt)
    if request.dry_run:
        return Sweeping(_only(takes), None)
    rt.keep_room(kept_bytes(takes.n_new_tokens, takes.n_watched))
    first = await _begun(planned, planned.generations[0], rt)
    return Sweeping(_events(planned, takes, first, rt), first)


class Sweeping(AsyncIterator[SweepResponse]):
    """Events of a sweep, whose first generation has begun. `aclose` frees its rows, also before the first event."""

    def __init__(self, events: AsyncGenerator[SweepResponse, None], first: Generation | None) -> None:
        self._events = events
        self._first = first

    async def __anext__(self) -> SweepResponse:
        return await anext(self._events)

    async def aclose(self) -> None:
        await self._events.aclose()
        if self._first is not None:
            await self._first.close()


@dataclass(frozen=True)
class Generation:
    """Cells that are written together, with what they were admitted with."""

    cells: Sequence[Cell]
    features: Sequence[Feature]
    """What is read of their texts."""
    story: Story
    stay: Stay

    async def close(self) -> None:
        """May be called again without effect."""
        await self.story.aclose()
        self.stay.close()


async def _begun(sweep: Sweep, cells: Sequence[Cell], rt: Runtime) -> Generation:
    """Raises Overloaded where there is no room now."""
    wanted, features = sweep.completion(cells, rt), sweep.read_together(cells)
    watch = sweep.request.watch or ()
    with Stay() as stay, reproducibly(sweep.request.reproducible):
        story = await text_story(wanted, rt, stream=False, keeps_ending=False, watch=watch)
    return Generation(cells, features, story, stay)


async def _only(takes: SweepTakes) -> AsyncGenerator[SweepResponse, None]:
    yield SweepResponse(takes=takes)


async def _events(
    sweep: Sweep, takes: SweepTakes, first: Generation, rt: Runtime
) -> AsyncGenerator[SweepResponse, None]:
    yield SweepResponse(takes=takes)
    told: list[SweepCell] = []
    account = await SweepAccount.of(sweep, rt) if sweep.request.receipt else None
    for cells in sweep.generations:
        generation = first if cells is first.cells else await _once_there_is_room(partial(_begun, sweep, cells, rt), rt)
        try:
            written = await _written(sweep, generation, rt)
        finally:
            await generation.close()
        if account is not None:
            await paced(account.adding(cells, generation.story))
        for cell in written:
            told.append(cell.model_copy(update={"watch": None}))  # what was watched is held by nobody but its reader
            plain, steered = ([cell], []) if cell.steering is None else ([], [cell])
            yield SweepResponse.model_construct(takes=None, cells=steered, default=plain, suggested=None, receipt=None)
    suggested = await paced(_suggesting(sweep, told)) if sweep.request.judge else None
    receipt = None if account is None else account.receipt()
    if suggested is not None or receipt is not None:
        yield SweepResponse.model_construct(takes=None, cells=[], default=[], suggested=suggested, receipt=receipt)


async def _once_there_is_room(attempt: Callable[[], Awaitable[T]], rt: Runtime) -> T:
    """Whoever came meanwhile is inside too: a server that is full is asked again, while nothing is held. Raises
    Overloaded after REQUEST_TIMEOUT."""
    most_s = rt.settings.request_timeout_s or inf
    until = time.monotonic() + most_s
    while True:
        try:
            return await attempt()
        except Overloaded:
            if time.monotonic() > until:
                raise
        await asyncio.sleep(AGAIN_S)


async def _written(sweep: Sweep, generation: Generation, rt: Runtime) -> list[SweepCell]:
    """Every text, to its end, and judged."""
    story, features = generation.story, generation.features
    async for _ in story:
        pass
    if not sweep.request.judge:
        return await paced(_cells(generation, None))
    generation.stay.close()  # what it held is free for what judges it
    judging = partial(judge, story, rt, reproducible=sweep.request.reproducible, features=features)
    with generation.stay:
        found = await _once_there_is_room(judging, rt)
    place = {feature: n for n, feature in enumerate(features)}
    read = zip(found, map(sweep.read_of, generation.cells), strict=True)
    return await paced(_cells(generation, [[of_row[place[one]] for one in of_cell] for of_row, of_cell in read]))


def _cells(generation: Generation, effects: Sequence[list[float]] | None) -> Generator[None, None, list[SweepCell]]:
    """-> its texts, with a yield after each."""
    told: list[SweepCell] = []
    for place, (row, cell) in enumerate(zip(generation.story.rows, generation.cells, strict=True)):
        told.append(_cell(row, cell, None if effects is None else effects[place]))
        yield
    return told


def _cell(row: Transcript, cell: Cell, effects: list[float] | None) -> SweepCell:
    return SweepCell.model_construct(
        prompt=cell.prompt,
        steering=cell.steering,
        strength=cell.strength,
        seed=cell.seed,
        text=row.text.text,
        tokens=[row.tokens[place] for place in range(len(row.tokens))],
        finish_reason=row.finish_reason,
        judge=row.judge,
        effects=effects,
        watch=None if row.watched is None else row.watched.so_far(),
    )


# What a sweep has found


def _suggesting(sweep: Sweep, told: Sequence[SweepCell]) -> Generator[None, None, SweepSuggestion]:
    """-> what is suggested, with a yield after each strength."""
    plain = {(one.prompt, one.seed): one for one in told if one.steering is None}
    own: dict[tuple[int | None, float | None], list[SweepCell]] = {}
    for one in told:
        own.setdefault((one.steering, one.strength), []).append(one)
    place = {feature: n for n, feature in enumerate(sweep.all_features)}
    means: list[list[Mean]] = []
    for steering, features in enumerate(sweep.features):
        columns, of_steering = [place[feature] for feature in features], list[Mean]()
        for strength in dict.fromkeys(sweep.request.strengths):
            pairs = [(one, plain[one.prompt, one.seed]) for one in own[steering, strength]]
            of_steering.append(_mean(strength, pairs, columns))
            yield
        means.append(of_steering)
    replies = [
        SweepMean(
            steering=steering,
            strength=one.strength,
            lost=one.lost if isfinite(one.lost) else None,
            repeated=one.repeated,
            effect=one.effect,
            holds=one.holds,
        )
        for steering, some in enumerate(means)
        for one in some
    ]
    return SweepSuggestion(
        strengths=[suggested(some) for some in means], means=replies, most_lost=MOST_LOST, most_repeated=MOST_REPEATED
    )


def _mean(strength: float, pairs: Sequence[tuple[SweepCell, SweepCell]], columns: Sequence[int]) -> Mean:
    """Of texts at one strength, each with the unsteered one. Texts without any token are no texts to judge.

    columns: of what is read of the unsteered ones, where the features of these lie.
    """
    judged = [(one.judge, other.judge) for one, other in pairs if one.judge is not None and other.judge is not None]
    moved = [
        np.mean([(one.effects or [])[n] - (other.effects or [])[column] for one, other in pairs])
        for n, column in enumerate(columns)
    ]
    return Mean(
        strength,
        lost=float(np.mean([other.logprob_per_token - one.logprob_per_token for one, other in judged] or [inf])),
        repeated=float(np.mean([max(0.0, one.repetition - other.repetition) for one, other in judged] or [1.0])),
        effect=float(np.mean(np.abs(moved))) if moved else abs(strength),
    )


SWEEP = Operation(
    name="sweep",
    path="/v1/sweep",
    request=SweepRequest,
    response=SweepResponse,
    summary="Steer the same prompts at many strengths, judge the texts, and suggest a strength",
    run=sweep,
    stream=sweep_events,
)
