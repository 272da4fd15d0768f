"""From a plan of edits to tensors at points, refusing what cannot be honoured before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.domain import MAX_STEERS, Tokens
from neuronpedia_inference.edits.doses import largest_dose, needs_maximum
from neuronpedia_inference.edits.doses import needs_norm as needs_norm_of
from neuronpedia_inference.edits.gauges import norms, unit
from neuronpedia_inference.edits.plan import (
    Condition,
    Direction,
    Do,
    Edit,
    Feature,
    Fires,
    Plan,
    Target,
    Then,
    Unit,
    fires_in,
)
from neuronpedia_inference.edits.proof import ResolvedEdit
from neuronpedia_inference.edits.rows import FeatureGauge, Gate, Gauge, Norm, RowEdit, Trigger
from neuronpedia_inference.edits.select import EVERYTHING, Selection, ordinary, without_special_of_prompt
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.protocol import only_read
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.points import Point
from neuronpedia_inference.questions.checks import check_index, check_vector
from neuronpedia_inference.saes.feature import CONSTANT_NORM, LAYER_NORM, FeatureWeights
from neuronpedia_inference.saes.shelf import Shelf
from neuronpedia_inference.scheduler.jobs import Steps

NO_DOSE_KNOWN = (
    "So nobody knows before it runs how large a dose it may become: let `then` be clamp, which bounds what is written, "
    "or warn."
)
NO_MAXIMUM_KNOWN = "Give an absolute amount, or the server maxima by LABELS_DIR."

_NORMS = {"none": Norm.NONE, CONSTANT_NORM: Norm.CONSTANT, LAYER_NORM: Norm.LAYER}


class EditResolver:
    """Knows the model's points, the SAEs' features, and which tokens are special."""

    def __init__(self, engine: ModelEngine, shelf: Shelf, special_ids: Sequence[int]) -> None:
        self._engine = engine
        self._shelf = shelf
        self._ordinary = ordinary(tuple(special_ids))
        self._without_special = without_special_of_prompt(tuple(special_ids))

    def checks(self, plan: Plan) -> Generator[None, None, None]:
        """Raises LimitExceeded, InvalidRequest, UnknownSource or UnknownPoint; a yield after each edit. No tensors."""
        if len(plan.edits) > MAX_STEERS:
            raise LimitExceeded(f"{len(plan.edits)} edits are too many, the most is {MAX_STEERS}. Send fewer.")
        for edit in plan.edits:
            try:
                self._check(edit)
                if plan.max_dose is not None and plan.max_dose.then is Then.REFUSE:
                    self._check_dose(edit, plan.max_dose.value)
            except InvalidRequest as exc:
                if not edit.field:
                    raise
                raise type(exc)(f"{edit.field}: {exc.message}") from exc
            yield

    def check_selections(
        self, plans: Iterable[Plan | None], ids: Sequence[int], *, n_prompt: int, n_positions: int
    ) -> None:
        """Raises InvalidRequest for an edit that would act on no position of a text.

        n_prompt: tokens of its prompt; what comes behind counts as generated. n_positions: how long it may become,
        beyond the `ids` that are known.
        """
        places, tokens = np.arange(n_positions), np.asarray(ids)
        known, unknown = places[: len(ids)], places[len(ids) :]

        @cache
        def acts(selection: Selection) -> bool:
            of_known = selection.weights(known, tokens, n_prompt)
            return bool(of_known.any() or selection.weights(unknown, None, n_prompt).any())

        for edit in (edit for plan in plans if plan is not None for edit in plan.edits):
            if edit.on is not None and not edit.on.is_everything and not acts(edit.on):
                raise InvalidRequest(
                    f"{edit.field}.on: selects none of the {n_prompt} positions of the prompt and the "
                    f"{n_positions - n_prompt} after it. Choose others, or leave `on` out."
                )

    def n_prompts(self, plans: Sequence[Plan | None], ids: Sequence[int]) -> int:
        """How many prompts checked plans make of one: those that no edit selects anything of are one, seeds of a plan
        too; what conditions see is each text's own."""
        places, tokens = np.arange(len(ids)), np.asarray(ids)

        @cache
        def acts(selection: Selection) -> bool:
            return bool(selection.weights(places, tokens, len(ids)).any())

        def begins_as(place: int, plan: Plan | None) -> Hashable:
            if plan is None:
                return None
            if any(edit.when is not None for edit in plan.edits):
                return (place,)
            return id(plan) if any(acts(self._selection(edit, plan)) for edit in plan.edits) else None

        return len({begins_as(place, plan) for place, plan in enumerate(plans)})

    def check_whole(self, plan: Plan) -> None:
        """Raises InvalidRequest for what texts that pass whole cannot be edited by: what one token has to wait for."""
        for edit in plan.edits:
            for fires in [] if edit.when is None else fires_in(edit.when):
                read, written = self._points(fires.feature)[0], self._points(edit.target)[-1]
                if read.reached > written.reached:
                    raise InvalidRequest(
                        f"{edit.field}.when: {read.name!r} is reached after {written.name!r}, where the edit acts, so "
                        "it acts on tokens that are generated one by one; this text passes whole. Name a feature that "
                        "is reached before, or steer."
                    )

    def points(self, plan: Plan) -> set[Point]:
        """Where a checked plan reads and writes."""
        fires = [fires for edit in plan.edits if edit.when is not None for fires in fires_in(edit.when)]
        targets = [*(edit.target for edit in plan.edits), *(one.feature for one in fires)]
        return {point for target in targets for point in self._points(target)}

    def written(self, plan: Plan) -> set[Point]:
        """Where a checked plan writes."""
        return {self._points(edit.target)[-1] for edit in plan.edits}

    def resolved(self, plan: Plan) -> tuple[ResolvedEdit, ...]:
        """The edits of a checked plan as they will be applied, in order. No tensors."""
        return tuple(self._resolved(edit, plan) for edit in plan.edits)

    def texts(self, texts: Sequence[Tokens], n_generated: Sequence[int], plan: Plan) -> Callable[[], Steps]:
        """What gives, on the worker, list[RowSpec]: texts to be read as they are edited.

        n_generated: tokens at the end of each that are no prompt; none where it is empty. Raises InvalidRequest for an
        edit that cannot act on one of them.
        """
        self.check_whole(plan)
        behind = n_generated or [0] * len(texts)
        for text, n in zip(texts, behind, strict=True):
            self.check_selections([plan], text.ids, n_prompt=len(text) - n, n_positions=len(text))
        return lambda: self._texts(texts, behind, plan)

    def _texts(self, texts: Sequence[Tokens], n_generated: Sequence[int], plan: Plan) -> Steps:
        edits = yield from self.resolve(plan)
        return [
            replace(only_read(text.ids), edits=edits, n_generated=n) for text, n in zip(texts, n_generated, strict=True)
        ]

    def resolve(self, plan: Plan) -> Steps:
        """-> tuple[RowEdit, ...]: the edits as tensors on the engine's device. Runs on the worker."""
        found: list[RowEdit] = []
        bound, directions = plan.max_dose, self._directions(plan)
        for edit in plan.edits:
            vector, feature = yield from self._along(edit.target, edit, directions)
            other, other_feature = None, None
            if edit.other is not None:
                other, other_feature = yield from self._along(edit.other, edit, directions)
            found.append(
                RowEdit(
                    point=self._points(edit.target)[-1],
                    vector=unit(vector) if edit.normalize else vector,
                    amount=self._amount(edit),
                    do=edit.do,
                    is_dose=edit.unit is Unit.DOSE,
                    on=self._selection(edit, plan),
                    when=None if edit.when is None else (yield from self._gate(edit.when)),
                    feature=feature,
                    other=other,
                    other_feature=other_feature,
                    most=bound.value if bound is not None and bound.then is Then.CLAMP else math.inf,
                )
            )
        return tuple(found)

    def _resolved(self, edit: Edit, plan: Plan) -> ResolvedEdit:
        read, written = self._points(edit.target)
        reads_here = edit.reads_feature and read == written
        return ResolvedEdit(edit, written.name, self._amount(edit), self._selection(edit, plan), reads_here)

    def _amount(self, edit: Edit) -> float:
        return edit.amount * (self._maximum(edit) if edit.unit is Unit.OF_MAX else 1.0)

    def _gate(self, condition: Condition) -> Steps:
        """-> Gate"""
        triggers: dict[Fires, Trigger] = {}
        for fires in fires_in(condition):
            source = self._shelf.source(fires.feature.source)
            with (yield self._shelf.feature(source, fires.feature.index)) as weights:
                gauge = gauge_of(weights, self._engine.device)
            point = Point.parse(source.hook)
            triggers[fires] = Trigger(point, gauge, fires.threshold, fires.is_below, self._ordinary)
        return Gate(condition, triggers)

    def _selection(self, edit: Edit, plan: Plan) -> Selection:
        if edit.on is not None:
            return edit.on
        if edit.reads_feature or edit.unit is Unit.DOSE or edit.when is not None:
            return self._ordinary
        return self._without_special if plan.skip_special_tokens else EVERYTHING

    def _directions(self, plan: Plan) -> Mapping[int, Tensor]:
        """Callers' own vectors on the engine's device, by the identity of each: one by one, hundreds take long."""
        by_hook: dict[str, list[tuple[Direction, Edit]]] = {}
        for edit in plan.edits:
            for target in edit.targets:
                if isinstance(target, Direction):
                    by_hook.setdefault(target.hook, []).append((target, edit))
        found: dict[int, Tensor] = {}
        for hook, some in by_hook.items():
            numbers = np.stack([np.asarray(one.vector, np.float32) for one, _ in some])
            vectors = torch.from_numpy(numbers).to(self._engine.device)
            for (one, edit), vector, norm in zip(some, vectors, norms(vectors)[:, 0].tolist(), strict=True):
                _check_norm(norm, hook, edit)
                found[id(one)] = vector
        return found

    def _along(self, target: Target, edit: Edit, directions: Mapping[int, Tensor]) -> Steps:
        """-> the vector on the engine's device, and how the feature is read where the edit does."""
        if isinstance(target, Direction):
            return directions[id(target)], None
        source = self._shelf.source(target.source)
        if not edit.reads_feature:
            with (yield self._shelf.decoder_row(source, target.index)) as row:
                vector = row.to(self._engine.device)
            _check_norm(float(norms(vector)), source.hook, edit)
            return vector, None
        with (yield self._shelf.feature(source, target.index)) as weights:
            assert weights.decoder is not None, source
            vector = weights.decoder.to(self._engine.device, torch.float32)
            gauge = gauge_of(weights, self._engine.device)
        _check_norm(float(norms(vector)), source.hook, edit)
        elsewhere = self._points(target)[0] if source.is_transcoder else None
        return vector, FeatureGauge((source.name, target.index), gauge, elsewhere)

    def _check(self, edit: Edit) -> None:
        if not math.isfinite(edit.amount):
            raise InvalidRequest("strength times strength_multiplier is not a finite number. Use smaller values.")
        for target in edit.targets:
            if isinstance(target, Feature):
                self._check_feature(target, edit)
            else:
                self._check_direction(target, edit)
        for fires in [] if edit.when is None else fires_in(edit.when):
            self._check_trigger(fires, edit)
        if edit.unit is Unit.OF_MAX:
            self._maximum(edit)

    def _check_dose(self, edit: Edit, bound: float) -> None:
        """Raises InvalidRequest for an edit that may write more than a dose, or of which that is not known."""
        is_dose, of_feature = edit.unit is Unit.DOSE, isinstance(edit.target, Feature)
        point = self._points(edit.target)[-1]
        norm = self._engine.typical_norm(point)
        needs_norm = needs_norm_of(edit.do, is_dose=is_dose, of_feature=of_feature)
        if needs_norm and not norm:
            raise InvalidRequest(f"max_dose: no typical norm is known of {point.name!r}. {NO_DOSE_KNOWN}")
        if isinstance(edit.target, Feature) and not self._shelf.source(edit.target.source).is_read_by_column:
            raise InvalidRequest(
                f"max_dose: the length of decoder rows of {edit.target.source!r} is not known. {NO_DOSE_KNOWN}"
            )
        if (
            isinstance(edit.target, Feature)
            and edit.reads_feature
            and self._shelf.source(edit.target.source).normalises
        ):
            raise InvalidRequest(f"max_dose: source {edit.target.source!r} normalises what it reads. {NO_DOSE_KNOWN}")
        dose = largest_dose(
            edit.do,
            self._amount(edit),
            is_dose=is_dose,
            of_feature=of_feature,
            length=_length(edit),
            norm=norm or 1.0,
            most=self._maximum(edit, "max_dose", NO_DOSE_KNOWN) if of_feature and needs_maximum(edit.do) else 0.0,
        )
        if dose > bound:
            at = f" at a norm of {norm:.4g}, which is typical there" * needs_norm
            raise InvalidRequest(
                f"max_dose: {edit.do.value} may write {dose:.4g} of what is at {point.name!r}{at}, the most is "
                f"{bound:g}. Take a smaller amount or a larger dose, or let `then` be clamp."
            )

    def _maximum(self, edit: Edit, field: str = "unit", remedy: str = NO_MAXIMUM_KNOWN) -> float:
        """The largest activation that is known of the feature. Raises InvalidRequest where there is none.

        field: what asks for it.
        """
        assert isinstance(edit.target, Feature), edit
        known = self._shelf.annotations(edit.target.source)
        maximum = math.nan if known is None else float(known.maximum[edit.target.index])
        if not maximum > 0:
            raise InvalidRequest(
                f"{field}: no largest activation is known of feature {edit.target.index} of {edit.target.source!r}. "
                f"{remedy}"
            )
        return maximum

    def _check_feature(self, feature: Feature, edit: Edit) -> None:
        source = self._shelf.source(feature.source)
        if source.is_neurons:
            raise InvalidRequest(f"Source {source.name!r} is MLP neurons, which have no decoder row to steer with.")
        check_index(source, feature.index)
        if source.is_transcoder and not source.hook_out:
            raise InvalidRequest(
                f"Source {source.name!r} is a {source.architecture}, which writes elsewhere than it reads, "
                "and does not say where: its features cannot be steered with. Use a custom vector at the hook you mean."
            )
        if edit.reads_feature and not source.is_read_by_column:
            raise InvalidRequest(
                f"Source {source.name!r} is of the kind {source.architecture}: {source.unread_alone_because}, so "
                f"do {edit.do.value!r} would have to compute all of it at every token, which is not served. `add` is."
            )
        if edit.reads_feature and source.normalises and (edit.unit is Unit.DOSE or source.is_transcoder):
            what = "whose features cannot be set" if source.is_transcoder else "so that no dose can be given"
            raise InvalidRequest(f"Source {source.name!r} normalises what it reads, {what}. `add` is served.")
        reads, writes = self._points(feature)
        self._engine.check(reads)
        self._engine.check(writes, write=True)

    def _check_trigger(self, fires: Fires, edit: Edit) -> None:
        source = self._shelf.source(fires.feature.source)
        if source.is_neurons or not source.is_read_by_column:
            raise InvalidRequest(
                f"when: source {source.name!r} is of the kind {source.architecture}, whose features cannot be read "
                "one by one while a text is written. Name a feature of another source."
            )
        check_index(source, fires.feature.index)
        read, written = Point.parse(source.hook), self._points(edit.target)[-1]
        self._engine.check(read)
        if fires.n_tokens == 1 and read.reached > written.reached:
            raise InvalidRequest(
                f"when: {read.name!r} is reached after {written.name!r}, where the edit acts, so at a token it is not "
                'known yet whether the feature fires there. Give `for` a number or "from_then_on": then it acts from '
                "the next generated token on."
            )

    def _check_direction(self, direction: Direction, edit: Edit) -> None:
        point = Point.parse(direction.hook)
        self._engine.check(point, write=True)
        check_vector(direction.vector, self._engine.width(point), direction.hook)
        if edit.needs_direction and not np.any(direction.vector):
            raise InvalidRequest(
                f"The steering vector at {direction.hook!r} is zero, which has no direction: "
                f"{edit.do.value!r}{' with normalize_steering' if edit.normalize else ''} needs one."
            )

    def _points(self, target: Target) -> tuple[Point, Point]:
        """Where it is read, and where it is written."""
        if isinstance(target, Direction):
            return Point.parse(target.hook), Point.parse(target.hook)
        source = self._shelf.source(target.source)
        return Point.parse(source.hook), Point.parse(
            source.hook_out if source.is_transcoder and source.hook_out else source.hook
        )


def _check_norm(norm: float, hook: str, edit: Edit) -> None:
    if not math.isfinite(norm) or (edit.needs_direction and norm == 0):
        raise InvalidRequest(f"The steering vector at {hook!r} has the norm {norm:g} and no direction.")


def gauge_of(weights: FeatureWeights, device: torch.device) -> Gauge:
    """How a feature is read by itself, in the units that activations are told in."""
    column, zero, one = weights.encoder.float(), torch.zeros(()), torch.ones(())
    shift = zero if weights.b_dec is None else column @ weights.b_dec.float()
    scale = one if weights.r_mag is None else weights.r_mag.float().exp()
    size_bias = weights.bias if weights.b_mag is None else weights.b_mag
    threshold = zero if weights.threshold is None else weights.threshold
    parts = (shift, scale, size_bias, weights.bias, threshold)
    numbers = torch.stack([part.float().to(column.device) for part in parts]).tolist()
    return Gauge(column.to(device), *numbers, least=0.0, norm=_NORMS[weights.normalisation])


def _length(edit: Edit) -> float:
    """Of what is written where an edit's number changes by 1; other than 1 of added vectors and swapped directions."""
    if not isinstance(edit.target, Direction) or edit.do not in (Do.ADD, Do.SWAP):
        return 1.0
    vector = np.asarray(edit.target.vector, dtype=np.float64)
    if edit.do is Do.ADD:
        return 1.0 if edit.normalize else float(np.linalg.norm(vector))
    assert isinstance(edit.other, Direction), edit
    other = np.asarray(edit.other.vector, dtype=np.float64)
    return float(np.linalg.norm(other / np.linalg.norm(other) - vector / np.linalg.norm(vector)))
