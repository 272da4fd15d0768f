"""From a plan of plain numbers to tensors at points, refusing what cannot be honoured before anything runs."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from neuronpedia_inference.domain import MAX_STEERS, Sampling, Tokens
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.points import Point
from neuronpedia_inference.engine.protocol import RowSpec, Steering
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.questions.checks import check_index, check_vector
from neuronpedia_inference.saes.shelf import Shelf
from neuronpedia_inference.scheduler.jobs import Steps
from neuronpedia_inference.steering.apply import unit
from neuronpedia_inference.steering.plan import Steer, SteerFeature, SteerMethod, SteerPlan, SteerVector


class SteerResolver:
    """Knows the model's points and the SAEs' decoder rows."""

    def __init__(self, engine: ModelEngine, shelf: Shelf) -> None:
        self._engine = engine
        self._shelf = shelf

    def checks(self, plan: SteerPlan) -> Generator[None, None, None]:
        """Raises LimitExceeded, InvalidRequest, UnknownSource or UnknownPoint; a yield after each steer. No tensors."""
        if len(plan.steers) > MAX_STEERS:
            raise LimitExceeded(f"{len(plan.steers)} steers are too many, the most is {MAX_STEERS}. Send fewer.")
        for steer in plan.steers:
            if not math.isfinite(steer.coefficient):
                raise InvalidRequest("strength times strength_multiplier is not a finite number. Use smaller values.")
            if isinstance(steer, SteerFeature):
                self._check_feature(steer)
            else:
                self._check_vector(steer, plan)
            yield

    def points(self, plan: SteerPlan) -> set[Point]:
        """Where a checked plan steers."""
        return {
            Point.parse(s.hook if isinstance(s, SteerVector) else self._shelf.source(s.source).hook)
            for s in plan.steers
        }

    def rows(self, prompt: Tokens, plans: Sequence[SteerPlan | None], sampling: Sampling) -> Steps:
        """-> list[RowSpec], one per plan; None is not steered. Runs on the worker."""
        special = tuple(place for place, is_special in enumerate(prompt.is_special) if is_special)
        found: list[RowSpec] = []
        for plan in plans:
            if plan is None:
                found.append(RowSpec(prompt.ids, sampling))
            else:
                steering = yield from self.resolve(plan)
                untouched = special if plan.skip_special_tokens else ()
                found.append(RowSpec(prompt.ids, sampling, steering, untouched))
        return found

    def resolve(self, plan: SteerPlan) -> Steps:
        """-> tuple[Steering, ...]: the steers as tensors on the engine's device. Runs on the worker."""
        found: list[Steering] = []
        for steer in plan.steers:
            if isinstance(steer, SteerFeature):
                source = self._shelf.source(steer.source)
                with (yield self._shelf.decoder_row(source, steer.index)) as row:
                    vector = row
                found.append(self._steering(Point.parse(source.hook), vector, steer, plan))
            else:
                vector = torch.tensor(steer.vector, dtype=torch.float32)
                found.append(self._steering(Point.parse(steer.hook), vector, steer, plan))
        return tuple(found)

    def _check_feature(self, steer: SteerFeature) -> None:
        source = self._shelf.source(steer.source)
        if source.is_neurons:
            raise InvalidRequest(f"Source {source.name!r} is MLP neurons, which have no decoder row to steer with.")
        check_index(source, steer.index)
        if source.is_transcoder:
            raise InvalidRequest(
                f"Source {source.name!r} is a {source.architecture}, which writes elsewhere than it reads: "
                "its features cannot be steered with. Use a custom vector at the hook you mean."
            )
        self._engine.check(Point.parse(source.hook), write=True)

    def _check_vector(self, steer: SteerVector, plan: SteerPlan) -> None:
        point = Point.parse(steer.hook)
        self._engine.check(point, write=True)
        check_vector(steer.vector, self._engine.width(point), steer.hook)
        needs_direction = plan.normalize or plan.method is not SteerMethod.SIMPLE_ADDITIVE
        if needs_direction and not any(steer.vector):
            raise InvalidRequest(
                f"The steering vector at {steer.hook!r} is zero, which has no direction: "
                f"{plan.method} {'with normalize_steering ' if plan.normalize else ''}needs one."
            )

    def _steering(self, point: Point, vector: Tensor, steer: Steer, plan: SteerPlan) -> Steering:
        vector = vector.to(self._engine.device)
        norm = float(vector.norm())
        needs_direction = plan.normalize or plan.method is not SteerMethod.SIMPLE_ADDITIVE
        if not math.isfinite(norm) or (needs_direction and norm == 0):
            raise InvalidRequest(f"The steering vector at {point.name!r} has the norm {norm:g} and no direction.")
        return Steering(point, unit(vector) if plan.normalize else vector, steer.coefficient, plan.method)
