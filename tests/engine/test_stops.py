"""Penalties, biases and stop strings in rows that decode together, against a plain Hugging Face loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import torch

from neuronpedia_inference.domain import Sampling, Written
from neuronpedia_inference.engine.completions import Completions
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep
from neuronpedia_inference.engine.stops import StopStrings
from neuronpedia_inference.engine.tokens import TextCodec
from tests import models
from tests.engine.engines import engine

PROMPT = (0, 72, 105, 44, 80, 33, 61)
CODEC = TextCodec(models.tokenizer())
LETTERS = tuple((CODEC.encode(letter)[0], 60.0) for letter in "abcdefgh")
"""Lifted above all others, so that what is written are letters."""
WRITTEN = Sampling(24, frequency_penalty=0.2, presence_penalty=0.3, logit_bias=LETTERS, n_logprobs=1)


def run(rows: list[RowSpec]) -> list[list[RowStep]]:
    out: list[list[RowStep]] = [[] for _ in rows]
    lane = engine("llama").lane
    with torch.inference_mode():
        steps = lane.prefill([(RowId(0, place), spec) for place, spec in enumerate(rows)])
        while steps:
            for step in steps:
                out[step.row.place].append(step)
            steps = lane.decode() if lane.rows else []
    return out


def ids(steps: list[RowStep]) -> list[int]:
    return [step.token_id for step in steps]


def told(steps: list[RowStep], *stop: str) -> Written:
    (row,) = asyncio.run(Completions(CODEC, 1, stop).written([replace(one, row=RowId(0, 0)) for one in steps]))
    return row


def by_hand(sampling: Sampling) -> list[int]:
    """Greedy, without a cache, in words of the OpenAI reference."""
    written: list[int] = []
    net = models.model("llama")
    with torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            logits = net(torch.tensor([[*PROMPT, *written]]), use_cache=False).logits[0, -1].double()
            for token, bias in sampling.logit_bias:
                logits[token] += bias
            for token, count in Counter(written).items():
                logits[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
            written.append(int(logits.argmax()))
    return written


def test_penalised_and_biased_rows_are_what_a_loop_by_hand_writes() -> None:
    without = replace(WRITTEN, frequency_penalty=0.0, presence_penalty=0.0)
    rows = [RowSpec(PROMPT, WRITTEN), RowSpec(PROMPT, without), RowSpec(PROMPT, Sampling(24))]
    penalised, biased, plain = run(rows)
    assert ids(penalised) == by_hand(WRITTEN) == ids(run(rows[:1])[0])
    assert ids(biased) == by_hand(without) != ids(penalised)
    assert ids(plain) == models.greedy(models.model("llama"), PROMPT, 24) != ids(biased)


def test_a_row_ends_at_the_token_that_completes_a_stop_string() -> None:
    """Alone and beside others; the row without goes on. The text is what lies before the string."""
    (free,) = run([RowSpec(PROMPT, WRITTEN)])
    text = told(free).text
    assert len(text) == 24
    stop = (text[9:12], "nowhere", text[20:])
    end = text.index(text[9:12])
    ruled = RowSpec(PROMPT, WRITTEN, stops=StopStrings(CODEC, stop))
    stopped, beside = run([ruled, RowSpec(PROMPT, WRITTEN)])
    assert ids(beside) == ids(free)
    assert ids(stopped) == ids(run([ruled])[0]) == ids(free)[: end + 3]
    assert [step.finish_reason for step in stopped] == [None] * (end + 2) + ["stop_string"]
    whole = told(stopped, *stop)
    assert whole.text == text[:end]
    assert len(whole.token_ids) == end + 3
    assert [one.token for one in whole.logprobs] == list(text[:end]), "of the string itself nothing is told"


def test_what_may_become_a_stop_string_is_held_back_and_told_once_it_does_not() -> None:
    (free,) = run([RowSpec(PROMPT, WRITTEN)])
    text = told(free).text
    stop = text[4:7] + "!"
    completions = Completions(CODEC, 1, [stop])
    said, shown = "", []
    for step in free:
        (news,) = asyncio.run(completions.written([step]))
        said += news.text
        shown.append(said)
        assert "".join(one.token for one in news.logprobs) == news.text
    place = text.index(text[4:7])
    assert [len(one) for one in shown[place : place + 4]] == [place, place, place, place + 4]
    assert said == text
