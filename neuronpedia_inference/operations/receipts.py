"""Receipts of steered texts: what they depended on, and proof that they were steered."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from neuronpedia_inference.domain import FeatureDigest, Sampling
from neuronpedia_inference.edits.plan import Direction, Feature, Plan, Unit, fires_in
from neuronpedia_inference.edits.proof import Moment, Traced
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.operations.story import Story, Transcript
from neuronpedia_inference.pacing import paced
from neuronpedia_inference.questions.fingerprints import Fingerprints, UsedFeature, norm_of, sha256_of
from neuronpedia_inference.schemas.receipt import (
    FORMAT,
    Receipt,
    ReceiptEdit,
    ReceiptFeature,
    ReceiptFile,
    ReceiptModel,
    ReceiptMoment,
    ReceiptSource,
    ReceiptText,
)
from neuronpedia_inference.watches.plan import FeaturesRead
from neuronpedia_inference.watches.rules import RulePlan

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

WAIT_S = 2.0
"""For digests that are still being computed, before the text is told; after that they are `pending`."""


class VectorDigest(NamedTuple):
    norm: float
    sha256: str


@dataclass(frozen=True)
class Evidence:
    """Digests of what steers and reads some texts."""

    features: Sequence[FeatureDigest]
    vectors: Mapping[int, VectorDigest]
    """By `id` of the numbers, which the plans hold."""
    whole: Sequence[str]
    """Sources that are read whole."""
    rt: Runtime

    @classmethod
    async def of(cls, plans: Sequence[Plan | None], reads: RulePlan | None, rt: Runtime) -> Evidence:
        """Raises EngineFailed where weights cannot be read."""
        used = tuple(_used(plans, reads, rt))
        features = await rt.ask(Fingerprints(used)) if used else []
        whole = [] if reads is None else [source.name for source in reads.watches.held]
        await rt.provenance.settled(whole, WAIT_S)
        return cls(features, await paced(_vectors(plans)), whole, rt)

    def circumstances(
        self, operation: str, request: BaseModel, sampling: dict[str, Any], *, is_reproducible: bool
    ) -> dict[str, Any]:
        """The fields of `schemas.receipt.Circumstances`."""
        provenance = self.rt.provenance
        model = provenance.model
        sources = [(name, provenance.source(name)) for name in self.whole]
        return {
            "format": FORMAT,
            "operation": operation,
            "versions": provenance.versions,
            "model": ReceiptModel.model_construct(
                name=provenance.name, status=model.status, files=_files(model.files), sha256=model.sha256
            ),
            "device": provenance.device,
            "dtype": provenance.dtype,
            "products": {} if is_reproducible else {name: list(of) for name, of in provenance.products.items()},
            "reproducible": is_reproducible,
            "request": as_sent(request),
            "sampling": sampling,
            "features": Rows(len(self.features), lambda n: ReceiptFeature.model_construct(**asdict(self.features[n]))),
            "sources": [
                ReceiptSource.model_construct(source=name, status=found.status, files=_files(found.files))
                for name, found in sources
            ],
        }

    def edits(self, row: Transcript) -> Sequence[ReceiptEdit]:
        """Of a text that has ended."""
        if row.proof is None:
            return []
        norms = {Feature(one.source, one.index): one.norm for one in self.features}
        proof = row.proof

        def edit(number: int) -> ReceiptEdit:
            target = proof.edits[number].edit.target
            vector = self.vectors[id(target.vector)] if isinstance(target, Direction) else None
            return _edit(proof.traced(number), norms, vector)

        return Rows(len(proof.edits), edit)


@dataclass(frozen=True)
class Account:
    """What is known of a request before its text is."""

    operation: str
    request: BaseModel
    story: Story
    evidence: Evidence

    @classmethod
    async def of(cls, operation: str, request: BaseModel, story: Story, rt: Runtime) -> Account:
        """Beside the generation, which has begun, and which ends if this fails. Raises EngineFailed where weights
        cannot be read."""
        async with AsyncExitStack() as on_failure:
            on_failure.push_async_callback(story.aclose)
            evidence = await Evidence.of(story.wanted.plans, story.wanted.reads, rt)
            on_failure.pop_all()
        return cls(operation, request, story, evidence)

    def receipt(self) -> Receipt | None:
        """Once the story has ended; None before."""
        if not self.story.has_ended:
            return None
        begun, rows = self.story.begun, self.story.rows
        sampling = sampling_as_sent(self.story.wanted.sampling)
        return Receipt.model_construct(
            **self.evidence.circumstances(
                self.operation, self.request, sampling, is_reproducible=begun.is_reproducible
            ),
            prompt_ids=list(begun.prompt.ids),
            prompt_tokens=list(begun.prompt.strings),
            edits=self.evidence.edits(rows[0]),
            steered=text_receipt(rows[0]),
            default=text_receipt(rows[1]) if len(rows) > 1 else None,
        )


def _vectors(plans: Sequence[Plan | None]) -> Generator[None, None, dict[int, VectorDigest]]:
    found: dict[int, VectorDigest] = {}
    for edit in (edit for plan in plans if plan is not None for edit in plan.edits):
        if isinstance(edit.target, Direction) and id(edit.target.vector) not in found:
            numbers = edit.target.vector
            found[id(numbers)] = VectorDigest(norm_of(numbers), sha256_of(numbers))
            yield
    return found


def as_sent(value: Any) -> Any:
    """A request as JSON-ready values: fields that were given, lists of numbers as they are."""
    if isinstance(value, BaseModel):
        return {
            name: as_sent(getattr(value, name)) for name in type(value).model_fields if name in value.model_fields_set
        }
    if isinstance(value, list | tuple):
        return (
            value
            if not value or not isinstance(value[0], BaseModel | list | tuple)
            else [as_sent(one) for one in value]
        )
    return value


def _used(plans: Sequence[Plan | None], wanted: RulePlan | None, rt: Runtime) -> Iterator[UsedFeature]:
    """Features of SAEs, each once; of those that only steer, the decoder row."""
    reads: dict[Feature, bool] = {}
    for edit in (edit for plan in plans if plan is not None for edit in plan.edits):
        for target in edit.targets:
            if isinstance(target, Feature):
                reads[target] = reads.get(target, False) or edit.reads_feature
        if edit.when is not None:
            reads |= {fires.feature: True for fires in fires_in(edit.when)}
    for read in () if wanted is None else wanted.watches.reads:
        if isinstance(read, FeaturesRead) and not read.source.is_neurons:
            reads |= {Feature(read.source.name, index): True for index in read.indices}
    for feature, is_read in reads.items():
        yield UsedFeature(rt.shelf.source(feature.source), feature.index, is_read)


def _files(found: Sequence[Any]) -> list[ReceiptFile]:
    return [ReceiptFile.model_construct(name=one.name, bytes=one.n_bytes, sha256=one.sha256) for one in found]


def sampling_as_sent(sampling: Sampling) -> dict[str, Any]:
    """How tokens are drawn, as JSON-ready values."""
    return {
        name: list(map(_listed, value)) if isinstance(value, tuple) else value
        for name, value in asdict(sampling).items()
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _edit(traced: Traced, norms: dict[Feature, float | None], vector: VectorDigest | None) -> ReceiptEdit:
    """vector: of an edit that is not by a feature."""
    resolved = traced.resolved
    edit, target = resolved.edit, resolved.edit.target
    return ReceiptEdit.model_construct(
        field=edit.field,
        do=edit.do.value,
        source=target.source if isinstance(target, Feature) else None,
        index=target.index if isinstance(target, Feature) else None,
        to=edit.other.index if isinstance(edit.other, Feature) else None,
        point=resolved.point,
        unit=(Unit.DOSE if edit.unit is Unit.DOSE else Unit.ABSOLUTE).value,
        amount=resolved.amount,
        norm=norms[target] if isinstance(target, Feature) else vector and vector.norm,
        vector_sha256=vector and vector.sha256,
        acted=traced.first is not None if traced.is_known else None,
        first=_moment(traced.first),
        last=_moment(traced.last),
    )


def _moment(moment: Moment | None) -> ReceiptMoment | None:
    if moment is None:
        return None
    return ReceiptMoment.model_construct(
        position=moment.position,
        token=moment.token,
        before=moment.before,
        after=moment.after,
        activation_before=moment.activation_before,
        activation_after=moment.activation_after,
        dose=moment.dose,
    )


def text_receipt(row: Transcript) -> ReceiptText:
    """Of a text that has ended."""
    return ReceiptText.model_construct(token_ids=row.token_ids, tokens=row.tokens, finish_reason=row.finish_reason)
