"""Stop strings in a text that grows, against the same text looked at whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.cuts import Cut

FEW = st.text("ab\n", max_size=12)
STRINGS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


@given(st.lists(FEW, max_size=6), STRINGS)
def test_a_text_ends_at_the_first_stop_string_however_it_comes(pieces: list[str], strings: list[str]) -> None:
    cut, whole, said = Cut(strings), "", ""
    for piece in pieces:
        whole += piece
        said += cut.push(piece)
        places = [place for place in map(whole.find, strings) if place >= 0]
        if places:
            assert cut.has_ended
            assert said == whole[: min(places)]
            break
        assert not cut.has_ended
        assert whole.startswith(said)
        begun = max((n for one in strings for n in range(len(one)) if whole.endswith(one[:n])), default=0)
        assert said == whole[: len(whole) - begun], "as much as can be said is said, and no more"
    else:
        assert said + cut.rest() == whole
