"""The receipt of a sweep: what its texts depended on, and of each what edited it and what was written."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neuronpedia_inference.operations.receipts import Evidence, sampling_as_sent, text_receipt
from neuronpedia_inference.operations.story import Story
from neuronpedia_inference.operations.sweep_plan import Cell, Sweep
from neuronpedia_inference.schemas.receipt import ReceiptCell, ReceiptPrompt, SweepReceipt

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


@dataclass
class SweepAccount:
    """What is known of a sweep while its texts are written."""

    sweep: Sweep
    evidence: Evidence
    prompts: dict[int, ReceiptPrompt] = field(default_factory=dict)
    cells: list[ReceiptCell] = field(default_factory=list)
    is_reproducible: bool = False

    @classmethod
    async def of(cls, sweep: Sweep, rt: Runtime) -> SweepAccount:
        """Raises EngineFailed where weights cannot be read."""
        return cls(sweep, await Evidence.of(sweep.plans, sweep.reads, rt))

    def adding(self, cells: Sequence[Cell], story: Story) -> Generator[None, None, None]:
        """Texts of one prompt, which have ended; a yield after each."""
        begun = story.begun
        self.is_reproducible = begun.is_reproducible
        self.prompts[cells[0].prompt] = ReceiptPrompt.model_construct(
            token_ids=list(begun.prompt.ids), tokens=list(begun.prompt.strings)
        )
        for cell, row in zip(cells, story.rows, strict=True):
            self.cells.append(
                ReceiptCell.model_construct(
                    prompt=cell.prompt,
                    steering=cell.steering,
                    strength=cell.strength,
                    seed=cell.seed,
                    edits=list(self.evidence.edits(row)),
                    text=text_receipt(row),
                )
            )
            yield

    def receipt(self) -> SweepReceipt:
        """Once all texts have been added."""
        sampling = sampling_as_sent(self.sweep.sampling)
        del sampling["seed"]  # every cell has its own
        return SweepReceipt.model_construct(
            **self.evidence.circumstances("sweep", self.sweep.request, sampling, is_reproducible=self.is_reproducible),
            prompts=[self.prompts[place] for place in sorted(self.prompts)],
            cells=self.cells,
        )
