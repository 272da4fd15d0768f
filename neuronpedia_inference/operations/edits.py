"""From what a request says of edits to a plan of plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neuronpedia_inference.edits.plan import (
    BY_METHOD,
    Both,
    Condition,
    Direction,
    Do,
    Edit,
    Either,
    Feature,
    Fires,
    MaxDose,
    Not,
    Plan,
    Target,
    Then,
    Unit,
)
from neuronpedia_inference.edits.select import Phase, Selection
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.kept_vectors import numbers_of
from neuronpedia_inference.operations.prompts import choose_source
from neuronpedia_inference.schemas import conditions as wire_conditions
from neuronpedia_inference.schemas import edits as wire
from neuronpedia_inference.schemas.conditions import FROM_THEN_ON, THIS_TOKEN, parts_of
from neuronpedia_inference.schemas.steering import SteerByFeature, Steering
from neuronpedia_inference.schemas.vectors import VectorName
from neuronpedia_inference.schemas.words import FeatureAddress

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def checked_plan(steering: Steering, rt: Runtime, *, skip_special_tokens: bool = False) -> Plan | None:
    """As `plan_of`, of what can be honoured. No tensor is touched.

    Raises InvalidRequest, UnknownSource, UnknownPoint and LimitExceeded, naming the field.
    """
    plan = plan_of(steering, rt, skip_special_tokens=skip_special_tokens)
    if plan is not None:
        await rt.check_steering(plan)
    return plan


def plan_of(
    steering: Steering,
    rt: Runtime,
    *,
    first: Steering | None = None,
    behind: tuple[Edit, ...] = (),
    skip_special_tokens: bool = False,
    can_warn: bool = False,
) -> Plan | None:
    """What a steering does; None where it does nothing. Raises InvalidRequest and UnknownSource, naming the field.

    first: another, whose edits act before its own. behind: edits that act after them. skip_special_tokens: edits of
    everything leave the prompt's special tokens as they are, as in chats. can_warn: whether the answer has a place for
    doses that are too large.
    """
    edits = (*(() if first is None else edits_of(first, rt)), *edits_of(steering, rt), *behind)
    most = _max_dose(steering) or (None if first is None else _max_dose(first))
    if most is not None and most.then is Then.WARN and not can_warn:
        raise InvalidRequest("max_dose.then: this answer has no place for warnings. Take clamp or refuse.")
    return Plan(edits, skip_special_tokens, most) if edits else None


def _max_dose(steering: Steering) -> MaxDose | None:
    bound = steering.max_dose
    return None if bound is None else MaxDose(bound.value, Then(bound.then))


def skips_special_tokens(request: Any, *, is_chat: bool) -> bool:
    """Whether edits of everything leave special tokens as they are: in chats that do not ask for more.

    request: has `steer_special_tokens`. Raises InvalidRequest where that is said of a text.
    """
    if not is_chat and "steer_special_tokens" in request.model_fields_set:
        raise InvalidRequest(
            "steer_special_tokens: goes with a chat. Leave it out, or say by an edit's `on` where it acts"
        )
    return is_chat and not request.steer_special_tokens


def edits_of(steering: Steering, rt: Runtime) -> tuple[Edit, ...]:
    """Features, vectors and edits, in this order. Raises InvalidRequest and UnknownSource, naming the field."""
    do, factor = BY_METHOD[steering.method], steering.strength_multiplier
    by_feature = [
        Edit(do, _feature(one, rt), factor * one.strength, field=f"features.{n}")
        for n, one in enumerate(steering.features or ())
    ]
    by_vector = [
        Edit(do, Direction(one.hook, numbers_of(one.vector, rt)), factor * one.strength, field=f"vectors.{n}")
        for n, one in enumerate(steering.vectors or ())
    ]
    return (*by_feature, *by_vector, *(_edit(one, n, rt) for n, one in enumerate(steering.edits or ())))


def _feature(one: SteerByFeature, rt: Runtime) -> Feature:
    return Feature(choose_source(one.source, lambda: rt.shelf.all_sources), one.index)


def selection_of(on: wire.Selection) -> Selection:
    """What is given, as numbers."""
    but = getattr(on, "except")
    ramp = None if on.ramp is None else (on.ramp[0], on.ramp[1])
    return _positions(on, ramp=ramp, but=() if but is None else (_positions(but),))


def condition_of(condition: wire_conditions.Condition, field: str, rt: Runtime) -> Condition:
    """With its features found. Raises InvalidRequest, naming the field."""
    parts = tuple(condition_of(part, field, rt) for part in parts_of(condition))
    if condition.all is not None:
        return Both(parts)
    if condition.any is not None:
        return Either(parts)
    if condition.feature is None:
        return Not(parts[0])
    lasting: Any = getattr(condition, "for")
    bound = condition.above if condition.below is None else condition.below
    return Fires(
        feature_of(condition.feature, field, rt),
        threshold=bound or 0.0,
        is_below=condition.below is not None,
        n_tokens={THIS_TOKEN: 1, FROM_THEN_ON: None}.get(lasting, lasting),
    )


def feature_of(name: str | FeatureAddress, field: str, rt: Runtime) -> Feature:
    """By its source and index, or by both in a text, perhaps behind a model. Raises InvalidRequest."""
    if isinstance(name, FeatureAddress):
        return Feature(name.source, name.index)
    source, _, index = name.rpartition("/")
    if not source or not (index.isascii() and index.isdecimal()) or len(index) > 9:
        raise InvalidRequest(f'{field}: {name[:80]!r} names no feature. Write it as "source/index", "15-res-4k/1113".')
    known = {one.name for one in rt.shelf.sources}
    model, _, rest = source.partition("/")
    if source not in known and rest and (rest in known or model in rt.model.known_names):
        source = rest
    return Feature(source, int(index))


def _edit(one: wire.SteerEdit, number: int, rt: Runtime) -> Edit:
    field = f"edits.{number}"
    given: Any = getattr(one, "with")
    target = _target(one.feature if one.vector is None else one.vector, one.hook, f"{field}.feature", rt)
    other = None if given is None else _target(given, one.hook, f"{field}.with", rt)
    if isinstance(target, Feature) and isinstance(other, Feature):
        if target == other:
            raise InvalidRequest(f"{field}.with: is the feature itself. Name another.")
        if target.source != other.source:
            raise InvalidRequest(
                f"{field}.with: is of {other.source!r}, the feature of {target.source!r}. Numbers of two sources do "
                "not count in the same units: name two features of one."
            )
    return Edit(
        do=Do.SCALE if one.do == wire.ABLATE else Do(one.do),
        target=target,
        amount=one.amount or 0.0,
        unit=Unit(one.unit),
        other=other,
        on=None if one.on is None else selection_of(one.on),
        when=None if one.when is None else condition_of(one.when, f"{field}.when", rt),
        field=field,
        name=one.id or "",
    )


def _target(given: Any, hook: str | None, field: str, rt: Runtime) -> Target:
    """given: a vector at `hook`, or a feature."""
    if isinstance(given, list | VectorName):
        return Direction(hook or "", numbers_of(given, rt))
    return feature_of(given, field, rt)


def _positions(
    one: wire.Positions, *, ramp: tuple[int, int] | None = None, but: tuple[Selection, ...] = ()
) -> Selection:
    return Selection(
        phase=Phase(one.phase),
        positions=None if one.positions is None else tuple(one.positions),
        start=getattr(one, "from"),
        stop=one.to,
        first=one.first,
        last=one.last,
        token_ids=None if one.token_ids is None else tuple(one.token_ids),
        ramp=ramp,
        but=but,
    )
