"""From a plan of plain numbers to tensors at points, refusing what cannot be honoured before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.domain import MAX_STEERS, Source
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.points import Point
from neuronpedia_inference.engine.protocol import Steering
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.saes.store import SaeStore
from neuronpedia_inference.scheduler.jobs import Steps
from neuronpedia_inference.steering.apply import unit
from neuronpedia_inference.steering.plan import Steer, SteerFeature, SteerMethod, SteerPlan, SteerVector


class SteerResolver:
    """Knows the model's points and the SAEs' decoder rows."""

    def __init__(self, engine: ModelEngine, store: SaeStore, find_source: Callable[[str], Source]) -> None:
        self._engine = engine
        self._store = store
        self._find_source = find_source

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
            Point.parse(s.hook if isinstance(s, SteerVector) else self._find_source(s.source).hook) for s in plan.steers
        }

    def resolve(self, plan: SteerPlan) -> Steps:
        """-> tuple[Steering, ...]: the steers as tensors on the engine's device. Runs on the worker."""
        found: list[Steering] = []
        for steer in plan.steers:
            if isinstance(steer, SteerFeature):
                source = self._find_source(steer.source)
                with (yield self._store.request(source.name)) as reader:
                    vector = reader.decoder_row(steer.index)
                found.append(self._steering(Point.parse(source.hook), vector, steer, plan))
            else:
                vector = torch.tensor(steer.vector, dtype=torch.float32)
                found.append(self._steering(Point.parse(steer.hook), vector, steer, plan))
        return tuple(found)

    def _check_feature(self, steer: SteerFeature) -> None:
        source = self._find_source(steer.source)
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


def check_index(source: Source, index: int) -> None:
    """Raises InvalidRequest unless 0 <= index < n_features."""
    if not 0 <= index < source.n_features:
        raise InvalidRequest(
            f"Feature index {index} is out of range for {source.name}, which has {source.n_features} features "
            f"(0 to {source.n_features - 1})."
        )


def check_vector(vector: Sequence[float], width: int, where: str) -> None:
    """Raises InvalidRequest for the wrong length or a number that is not finite in float32."""
    if len(vector) != width:
        raise InvalidRequest(f"The vector for {where!r} has {len(vector)} numbers; {width} are needed.")
    is_finite = np.abs(np.asarray(vector, dtype=np.float64)) <= np.finfo(np.float32).max
    if not is_finite.all():
        raise InvalidRequest(f"The vector for {where!r} is not finite in float32 at position {is_finite.argmin()}.")
