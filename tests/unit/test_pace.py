"""How much runs between two decode steps, and how long a request keeps what it was admitted with."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.costs import Demand
from neuronpedia_inference.scheduler.admission import Admission
from neuronpedia_inference.scheduler.pace import BETWEEN_STREAMED, BETWEEN_UNSEEN, LEAST_TOKENS, UNTRIED_TOKENS, Pace
from neuronpedia_inference.scheduler.stay import Stay, at_the_end


@given(
    st.floats(0.001, 1.0),
    st.floats(1e-6, 0.1),
    st.floats(0.05, 1.0),
    st.lists(st.integers(1, 512), min_size=1, max_size=20),
    st.sampled_from([BETWEEN_STREAMED, BETWEEN_UNSEEN]),
)
def test_a_piece_is_foretold_to_fit_between_two_steps(
    step_s: float, token_s: float, depth: float, sizes: list[int], steps: float
) -> None:
    """On a machine that takes depth × (a step + a time for each token), whatever was measured on it."""
    pace = Pace()
    pace.stepped(step_s)
    for n_tokens in sizes:
        pace.passed(n_tokens, depth, depth * (step_s + n_tokens * token_s))
    n_tokens = pace.tokens(depth, 512, steps)
    assert LEAST_TOKENS <= n_tokens <= 512
    if n_tokens > LEAST_TOKENS:
        assert depth * (step_s + n_tokens * token_s) <= steps * step_s * (1 + 1e-6)
    if n_tokens < 512:
        assert depth * (step_s + (max(n_tokens, LEAST_TOKENS) + 1) * token_s) > steps * step_s * (1 - 1e-6)


def test_what_has_not_been_measured_is_tried_with_little() -> None:
    assert Pace().tokens(1.0, 512, 1.0) == UNTRIED_TOKENS
    assert Pace().tokens(1.0, 4, 1.0) == 4


BOUNDS = Demand(requests=1, rows=9, tokens=9, bytes=9)


@pytest.mark.parametrize("work_ends_first", [True, False])
def test_a_permit_is_held_until_the_answer_has_gone_and_the_work_has_ended(work_ends_first: bool) -> None:
    admission, work = Admission(BOUNDS), Future()
    with Stay() as stay:
        at_the_end(work, admission.permit(Demand()).release)
    for end in [lambda: work.set_result(None), stay.close][:: 1 if work_ends_first else -1]:
        assert admission.inside.requests == 1
        end()
    assert admission.inside.requests == 0
    stay.close()
    assert admission.inside.requests == 0


def test_a_request_that_fails_keeps_nothing() -> None:
    admission, work = Admission(BOUNDS), Future()

    def fail() -> None:
        with Stay():
            at_the_end(work, admission.permit(Demand()).release)
            work.set_result(None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert admission.inside.requests == 0


def test_outside_of_a_stay_the_end_of_the_work_is_the_end() -> None:
    admission, work = Admission(BOUNDS), Future()
    with closing(Stay()) as stay, stay:
        pass
    at_the_end(work, admission.permit(Demand()).release)
    assert admission.inside.requests == 1
    work.set_result(None)
    assert admission.inside.requests == 0
