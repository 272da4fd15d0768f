"""What is said of how well a written text holds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from neuronpedia_inference.schemas.common import Reply

Judge = Annotated[
    bool,
    Field(
        description="Also judge every text, once it has ended: how likely the unsteered model finds it, how much it "
        "repeats, and how hard each edit has pushed. It costs a pass over prompt and text, and what `watch` does."
    ),
]


class SteerJudge(Reply):
    """How well a text holds."""

    logprob_per_token: float = Field(
        description="Mean over its tokens, the one that ended it included, of the natural logarithm of their "
        "probability to the unsteered model."
    )
    repetition: float = Field(
        description="Share of its runs of three tokens that were there before, from 0 to below 1 (seq-rep-3)."
    )
    dose: list[float | None] = Field(
        description="Of each edit, in the order of features, vectors and edits, how far it has moved the state along "
        "its own direction, as a share of the state's norm before the edits of that place: the mean over the generated "
        "tokens, 0 where it did not act. Null where it cannot be told from other edits of the place. Empty without any."
    )
