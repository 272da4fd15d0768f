"""Hook names."""

from __future__ import annotations

import pytest

from neuronpedia_inference.errors import UnknownPoint
from neuronpedia_inference.points import READABLE, Point


@pytest.mark.parametrize("place", READABLE)
def test_names_come_back_as_they_went_in(place: str) -> None:
    assert Point.parse(f"blocks.17.{place}").name == f"blocks.17.{place}"


def test_short_forms_mean_the_long_ones() -> None:
    assert Point.parse("blocks.3.hook_z") == Point(3, "attn.hook_z")
    assert Point.parse("blocks.3.hook_mlp_in") == Point(3, "mlp.hook_in")
    assert Point.parse("blocks.3.hook_attn_in") == Point(3, "attn.hook_in")


@pytest.mark.parametrize(
    "name",
    ["", "blocks", "blocks.x.hook_z", "blocks.1", "blocks.1.", "blocks.-1.hook_z", "blocks.99999.hook_z", "a" * 10_000],
)
def test_other_names_are_refused_with_a_short_message(name: str) -> None:
    with pytest.raises(UnknownPoint) as refusal:
        Point.parse(name)
    assert len(str(refusal.value)) < 400
