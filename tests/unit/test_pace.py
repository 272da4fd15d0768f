"""How much runs between two decode steps, and how long a request keeps what it was admitted with."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.costs import Demand, together
from neuronpedia_inference.errors import Overloaded
from neuronpedia_inference.scheduler.admission import Admission
from neuronpedia_inference.scheduler.pace import BETWEEN_STREAMED, BETWEEN_UNSEEN, LEAST_TOKENS, UNTRIED_TOKENS, Pace
from neuronpedia_inference.scheduler.stay import Stay, hold, idle


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
        hold(work, admission.permit(Demand()))
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
            hold(work, admission.permit(Demand()))
            work.set_result(None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert admission.inside.requests == 0


def test_outside_of_a_stay_the_end_of_the_work_is_the_end() -> None:
    admission, work = Admission(BOUNDS), Future()
    with closing(Stay()) as stay, stay:
        pass
    hold(work, admission.permit(Demand()))
    assert admission.inside.requests == 1
    work.set_result(None)
    assert admission.inside.requests == 0


def test_what_follows_in_a_request_has_the_room_of_what_has_ended() -> None:
    """Requests that need the same again never wait for each other's room."""
    admission, need = Admission(Demand(requests=2, rows=8, tokens=9, bytes=9)), Demand(rows=4)
    for stay in (Stay(), Stay()):
        with stay:
            for _ in range(3):
                work: Future[None] = Future()
                hold(work, admission.permit(need, idle()))
                work.set_result(None)
    assert admission.inside == Demand(requests=2, rows=8)
    with Stay():
        hold(Future(), admission.permit(Demand(requests=0)))
        assert idle() == []  # what has not ended has its room for itself


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 9)), max_size=40))
def test_a_request_has_room_for_the_largest_of_its_works(program: list[tuple[int, int, int]]) -> None:
    admission = Admission(Demand(requests=3, rows=8, tokens=20, bytes=9))
    needs: dict[int, Demand] = {}
    stays = [Stay() for _ in range(3)]
    for number, rows, tokens in program:
        work: Future[None] = Future()
        with stays[number]:
            wanted = Demand(1, rows, tokens, 0).at_least(needs.get(number, Demand(requests=0)))
            try:
                hold(work, admission.permit(Demand(1, rows, tokens, 0), idle()))
                needs[number] = wanted
            except Overloaded:
                others = [need for other, need in needs.items() if other != number]
                assert together([wanted, *others], 0).beyond(admission.bounds)
        work.set_result(None)
        assert admission.inside == together(needs.values(), 0)
    for stay in stays:
        stay.close()
    assert admission.inside == Demand(requests=0)
