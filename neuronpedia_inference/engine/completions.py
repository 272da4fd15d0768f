"""From decode steps to what a caller reads: text so far, token ids, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from neuronpedia_inference.domain import Completion, TokenLogprob
from neuronpedia_inference.engine.protocol import RowStep
from neuronpedia_inference.engine.tokens import TextCodec, TextStream


@dataclass
class _RowText:
    stream: TextStream
    logprobs: list[TokenLogprob] = field(default_factory=list)
    latest: Completion = Completion()


class Completions:
    """The growing completions of one request's rows."""

    def __init__(self, codec: TextCodec, n_rows: int) -> None:
        self._codec = codec
        self._rows = [_RowText(TextStream(codec)) for _ in range(n_rows)]

    def advance(self, steps: Sequence[RowStep]) -> tuple[Completion, ...]:
        """Take in one decode step; every row's completion so far, in row order."""
        for step in steps:
            row = self._rows[step.row.place]
            text = row.stream.push(step.token_id)
            if step.finish_reason is not None:
                text = row.stream.text
            if step.logprob is not None:
                row.logprobs.append(self._logprob(step, step.logprob))
            row.latest = Completion(text, tuple(row.stream.ids), tuple(row.logprobs), step.finish_reason)
        return tuple(row.latest for row in self._rows)

    def _logprob(self, step: RowStep, logprob: float) -> TokenLogprob:
        name = self._codec.token_string
        return TokenLogprob(name(step.token_id), logprob, tuple((name(i), value) for i, value in step.top))
