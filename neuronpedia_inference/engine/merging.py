"""Whether rows may share a pass: the loaded model's own rows, merged and alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.engine.agreement import logits_agree, overflow
from neuronpedia_inference.engine.cache import SLIDING, MaskForm, windows
from neuronpedia_inference.engine.decoder import Decoder
from neuronpedia_inference.engine.faults import in_short, trial_failure
from neuronpedia_inference.engine.generation import Lane, NewRows
from neuronpedia_inference.engine.prompts import CapturePass
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep, only_read
from neuronpedia_inference.engine.static import Record
from neuronpedia_inference.points import RESID_POST, Point

_WINDOW = 4
"""Positions, while merging is tried: a text of a few tokens then passes the window."""
_PIECE = 2
_MERGED_KINDS = frozenset(("full_attention", SLIDING))

Results = Sequence[Sequence[Tensor]]
"""Of every row, what each of its steps gave."""


def why_not_merge(decoder: Decoder, ids: Sequence[int], max_positions: int | None) -> tuple[str, str]:
    """How decode steps are masked, and why rows of different requests must not share them; empty if they may.

    `ids`: at least 7 tokens. max_positions: of the longest text that will be served.
    """
    because = _turns(decoder, max_positions) or _keeps_a_state(decoder)
    if because:
        return "", because
    decoder = replace(decoder, stop_ids=frozenset())
    rows = _rows(decoder, ids)
    with _short_windows(decoder):
        found: list[Results] = []
        failure = trial_failure("running rows alone", lambda: found.append(_steps_alone(decoder, rows)))
        if failure is not None:
            return "", f"rows of this model cannot be run, not even alone: {in_short(failure)}"
        alone = found[0]
        for form in MaskForm:
            what = f"merging rows with {form} masks"
            merged = partial(_steps_merged, decoder, form, rows)
            because = _why_different(decoder, alone, what, merged)
            if not because:
                return form, ""
    return "", because


def why_not_capture(decoder: Decoder, ids: Sequence[int], max_positions: int | None) -> str:
    """Why prompts of different length must not share a pass that is only read; empty if they may."""
    prompts = [list(ids), list(ids[1:3]), list(ids[2:7])]
    point = Point(decoder.tree.n_layers - 1, RESID_POST)

    def read(group: Sequence[Sequence[int]]) -> Results:
        passing = CapturePass(decoder, [only_read(prompt) for prompt in group], [point])
        passing.advance(passing.width)
        return [[seen[: len(prompt)]] for seen, prompt in zip(passing.seen[point], group, strict=True)]

    with _short_windows(decoder):
        alone = [read([prompt])[0] for prompt in prompts]
        because = _why_different(decoder, alone, "merging prompts", lambda: read(prompts))
    return _turns(decoder, max_positions) or because


def why_not_record(decoder: Decoder, form: str, record: Record, ids: Sequence[int]) -> str:
    """Why decode steps must run operation by operation; empty if recorded ones give the same logits."""
    if not form:
        return "rows of this model do not decode together"
    if form != MaskForm.ADDITIVE:
        return "the rows' masks have another form on this model"
    decoder = replace(decoder, stop_ids=frozenset())
    rows = _rows(decoder, ids)
    usual = _steps(Lane.merging(decoder, MaskForm(form)), rows)
    recorded = partial(_steps_merged, decoder, MaskForm(form), rows, record)
    return _why_different(decoder, usual, "recording steps", recorded)


def _rows(decoder: Decoder, ids: Sequence[int]) -> list[RowSpec]:
    """Three of different length, the second steered."""
    embedding: Any = decoder.model.get_input_embeddings()
    width = embedding.weight.shape[1]
    vector = torch.ones(width, device=decoder.model.device)
    steering = (RowEdit(Point(0, RESID_POST), vector, 1.0, Do.ADD),)
    return [
        RowSpec(tuple(ids[:7]), Sampling(8)),
        RowSpec(tuple(ids[1:3]), Sampling(8), steering),
        RowSpec(tuple(ids[2:7]), Sampling(8)),
    ]


def _steps_alone(decoder: Decoder, rows: Sequence[RowSpec]) -> Results:
    """The logits of what `_steps` runs, each row for itself with Hugging Face's own cache."""
    results = []
    for row, fed in zip(rows, ((1, 2), (1, 2, 3), (2, 3)), strict=True):
        lane = Lane.alone(decoder)
        _begin(lane, [(RowId(0, 0), row)])
        results.append([lane.logits(torch.tensor([[token]]))[0] for token in fed])
    return results


def _steps_merged(decoder: Decoder, form: MaskForm, rows: Sequence[RowSpec], record: Record | None = None) -> Results:
    return _steps(Lane.merging(decoder, form, record), rows)


def _steps(lane: Lane, rows: Sequence[RowSpec]) -> Results:
    """Two rows begin, the third joins late and in pieces, then the first leaves. A step feeds all rows one token."""
    first, second, third = ((RowId(0, place), row) for place, row in enumerate(rows))
    _begin(lane, [first, second])
    one = lane.logits(torch.full((2, 1), 1))
    joining = lane.begin([third])
    while not joining.is_done:
        joining.advance(_PIECE)
    _all_went_on(joining.join())
    two = lane.logits(torch.full((3, 1), 2))
    lane.drop([first[0]])
    three = dict(zip(_settled(lane), lane.logits(torch.full((2, 1), 3)), strict=True))
    return [[one[0], two[0]], [one[1], two[1], three[second[0]]], [two[2], three[third[0]]]]


def _begin(lane: Lane, rows: NewRows) -> None:
    _all_went_on(lane.prefill(rows))


def _all_went_on(steps: Sequence[RowStep]) -> None:
    """Raises what ended a row, such as numbers that are not finite: there is nothing to compare then."""
    for step in steps:
        if step.error is not None:
            raise step.error


def _settled(lane: Lane) -> Sequence[RowId]:
    """Who will have which row of the next step: the last takes the place of one that has left."""
    rows = lane.rows
    return [rows[-1], *rows[:-1]]


def _why_different(decoder: Decoder, expected: Results, what: str, attempt: Callable[[], Results]) -> str:
    """Empty if what `attempt` gives is what is expected."""
    found: list[Results] = []
    failure = trial_failure(what, lambda: found.append(attempt()))
    if failure is not None:
        return f"rows of this model cannot be run together: {in_short(failure)}"
    dtype = decoder.model.dtype
    pairs = [(a, b) for row, of in zip(found[0], expected, strict=True) for a, b in zip(row, of, strict=True)]
    if all(logits_agree(a, b, dtype) for a, b in pairs):
        return ""
    return overflow(dtype, *(one for pair in pairs for one in pair)) or "rows come out different together and alone"


def _turns(decoder: Decoder, max_positions: int | None) -> str:
    rotation = decoder.tree.rotation
    if rotation.horizon is None or (max_positions is not None and not rotation.passes(max_positions)):
        return ""
    return f"beyond {rotation.horizon} positions the rotary angles of a text depend on its length"


def _keeps_a_state(decoder: Decoder) -> str:
    text: Any = decoder.model.config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - _MERGED_KINDS
    return f"layers of the kind {min(others)} keep what they know of a row elsewhere than in slots" if others else ""


@contextmanager
def _short_windows(decoder: Decoder) -> Iterator[None]:
    """Sliding windows so short that a probe passes them. Masks and caches are made from the configuration."""
    text: Any = decoder.model.config.get_text_config()
    if not any(windows(text).values()):
        yield
        return
    window, text.sliding_window = text.sliding_window, _WINDOW
    try:
        yield
    finally:
        text.sliding_window = window
