"""The receipt of a steered text: what it depended on, and proof that it was steered."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from neuronpedia_inference.completion import Completion
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

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

WAIT_S = 2.0
"""For digests that are still being computed, before the text is told; after that they are `pending`."""


@dataclass(frozen=True)
class Account:
    """What is known of a request before its text is."""

    operation: str
    request: BaseModel
    story: Story
    features: Sequence[FeatureDigest]
    vectors: Sequence[VectorDigest | None]
    """Of the edits of the first row, in order; None of those by a feature."""
    rt: Runtime

    @classmethod
    async def of(cls, operation: str, request: BaseModel, story: Story, rt: Runtime) -> Account:
        """Beside the generation, which has begun, and which ends if this fails. Raises EngineFailed where weights
        cannot be read."""
        async with AsyncExitStack() as on_failure:
            on_failure.push_async_callback(story.aclose)
            used = tuple(_used(story.wanted, rt))
            features = await rt.ask(Fingerprints(used)) if used else []
            vectors = await paced(_vectors(story.wanted.plans[0]))
            await rt.provenance.settled(_whole(story.wanted), WAIT_S)
            on_failure.pop_all()
        return cls(operation, request, story, features, vectors, rt)

    def receipt(self) -> Receipt | None:
        """Once the story has ended; None before."""
        if not self.story.has_ended:
            return None
        begun, provenance, rows = self.story.begun, self.rt.provenance, self.story.rows
        model = provenance.model
        sources = [(name, provenance.source(name)) for name in _whole(self.story.wanted)]
        return Receipt.model_construct(
            format=FORMAT,
            operation=self.operation,
            versions=provenance.versions,
            model=ReceiptModel.model_construct(
                name=provenance.name,
                status=model.status,
                files=_files(model.files),
                sha256=model.sha256,
            ),
            device=provenance.device,
            dtype=provenance.dtype,
            products={} if begun.is_reproducible else {name: list(of) for name, of in provenance.products.items()},
            reproducible=begun.is_reproducible,
            request=as_sent(self.request),
            prompt_ids=list(begun.prompt.ids),
            prompt_tokens=list(begun.prompt.strings),
            sampling=_sampling(self.story.wanted.sampling),
            features=Rows(len(self.features), lambda n: ReceiptFeature.model_construct(**asdict(self.features[n]))),
            sources=[
                ReceiptSource.model_construct(source=name, status=found.status, files=_files(found.files))
                for name, found in sources
            ],
            edits=self._edits(rows[0]),
            steered=_text(rows[0]),
            default=_text(rows[1]) if len(rows) > 1 else None,
        )

    def _edits(self, row: Transcript) -> Sequence[ReceiptEdit]:
        if row.proof is None:
            return []
        norms = {Feature(one.source, one.index): one.norm for one in self.features}
        proof = row.proof
        return Rows(len(proof.edits), lambda n: _edit(proof.traced(n), norms, self.vectors[n]))


class VectorDigest(NamedTuple):
    norm: float
    sha256: str


def _vectors(plan: Plan | None) -> Generator[None, None, list[VectorDigest | None]]:
    found: list[VectorDigest | None] = []
    for edit in () if plan is None else plan.edits:
        numbers = edit.target.vector if isinstance(edit.target, Direction) else None
        found.append(None if numbers is None else VectorDigest(norm_of(numbers), sha256_of(numbers)))
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


def _used(wanted: Completion, rt: Runtime) -> Iterator[UsedFeature]:
    """Features of SAEs, each once; of those that only steer, the decoder row."""
    reads: dict[Feature, bool] = {}
    for edit in (edit for plan in wanted.plans if plan is not None for edit in plan.edits):
        for target in edit.targets:
            if isinstance(target, Feature):
                reads[target] = reads.get(target, False) or edit.reads_feature
        if edit.when is not None:
            reads |= {fires.feature: True for fires in fires_in(edit.when)}
    for read in () if wanted.reads is None else wanted.reads.watches.reads:
        if isinstance(read, FeaturesRead) and not read.source.is_neurons:
            reads |= {Feature(read.source.name, index): True for index in read.indices}
    for feature, is_read in reads.items():
        yield UsedFeature(rt.shelf.source(feature.source), feature.index, is_read)


def _whole(wanted: Completion) -> list[str]:
    return [] if wanted.reads is None else [source.name for source in wanted.reads.watches.held]


def _files(found: Sequence[Any]) -> list[ReceiptFile]:
    return [ReceiptFile.model_construct(name=one.name, bytes=one.n_bytes, sha256=one.sha256) for one in found]


def _sampling(sampling: Sampling) -> dict[str, Any]:
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


def _text(row: Transcript) -> ReceiptText:
    return ReceiptText.model_construct(token_ids=row.token_ids, tokens=row.tokens, finish_reason=row.finish_reason)
