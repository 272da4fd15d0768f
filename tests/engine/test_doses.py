"""Bounds on doses against what edits write at states of every kind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neuronpedia_inference.edits.doses import largest_dose, needs_maximum, needs_norm
from neuronpedia_inference.edits.plan import N_TOLD, OF_DIRECTIONS, OF_FEATURES, Do
from neuronpedia_inference.edits.record import EditRecord
from neuronpedia_inference.edits.row_table import RowTable
from neuronpedia_inference.edits.table import EditTable
from neuronpedia_inference.errors import InvalidRequest
from tests import models
from tests.edits_by_hand import WIDTH, Hand, sae
from tests.engine.test_replays import SAE, served
from tests.engine.test_verify import write_sae
from tests.engine.test_watches import NoHostReads

PLACE = "hook_resid_post"
NORM = 7.0
VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
OTHER = torch.randn(WIDTH, generator=torch.Generator().manual_seed(6))


def states() -> Tensor:
    """[pos, width], all of one norm: anywhere, and along and against the direction."""
    found = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(7))
    found = torch.cat([found, VECTOR[None], -VECTOR[None]])
    return NORM * found / found.norm(dim=-1, keepdim=True)


def doses(hand: Hand) -> Tensor:
    """[pos]: what an edit writes at these states, by their norm."""
    h = states()
    return (EditTable([RowTable([hand.resolved()])])(h[None])[0] - h).norm(dim=-1) / NORM


def factor(do: Do) -> bool:
    return do in (Do.SCALE, Do.ORTHOGONAL)


@pytest.mark.parametrize("amount", [-4.0, -0.3, 0.5, 9.0])
@pytest.mark.parametrize("is_dose", [False, True])
@pytest.mark.parametrize("do", sorted(OF_DIRECTIONS))
def test_no_direction_is_written_further_and_the_bound_is_reached(do: Do, is_dose: bool, amount: float) -> None:
    if is_dose and (factor(do) or do in (Do.SWAP, Do.PROJECT_OUT)):
        return
    swapped = OTHER if do is Do.SWAP else None
    hand = Hand(do, 1, PLACE, amount, vector=VECTOR, gives_to=swapped, is_dose=is_dose)
    length = float((OTHER / OTHER.norm() - VECTOR / VECTOR.norm()).norm()) if swapped is not None else VECTOR.norm()
    bound = largest_dose(do, amount, is_dose=is_dose, of_feature=False, length=float(length), norm=NORM)
    assert float(doses(hand).max()) == pytest.approx(bound, rel=1e-4, abs=1e-5)
    other = largest_dose(do, amount, is_dose=is_dose, of_feature=False, length=float(length), norm=2 * NORM)
    assert (other != bound) <= needs_norm(do, is_dose=is_dose, of_feature=False)


@pytest.mark.parametrize("amount", [-4.0, 0.5, 9.0])
@pytest.mark.parametrize("do", sorted(OF_FEATURES))
def test_no_feature_is_written_further(do: Do, amount: float) -> None:
    """Of a feature that is never stronger than it is in these states."""
    of = sae("jumprelu", size=NORM / math.sqrt(WIDTH))
    acts = of.encode(states())
    index = int(acts.max(dim=0).values.argmax())
    most = float(acts[:, index].max())
    hand = Hand(do, 1, PLACE, amount, of=of, index=index, gives_to=index - 1 if do is Do.SWAP else None)
    found = float(doses(hand).max())
    bound = largest_dose(do, amount, is_dose=False, of_feature=True, norm=NORM, most=most)
    assert found <= bound * (1 + 1e-4) + 1e-5
    assert do is Do.SWAP or found == pytest.approx(bound, rel=1e-4, abs=1e-5)
    less = largest_dose(do, amount, is_dose=False, of_feature=True, norm=NORM, most=most / 2)
    assert (less != bound) <= needs_maximum(do)


def test_what_is_told_and_limited_waits_for_nothing() -> None:
    """Edits of every kind, told and limited, in a mode that refuses whatever makes the host wait for the device."""
    of = sae("gated", size=1.0)
    directions = [Hand(do, 1, PLACE, 0.5, vector=VECTOR, gives_to=OTHER, most=0.2) for do in sorted(OF_DIRECTIONS)]
    features = [Hand(do, 1, PLACE, 0.5, of=of, index=3, gives_to=4, most=0.2) for do in sorted(OF_FEATURES)]
    edits = tuple(hand.resolved() for hand in (*directions, *features))
    record, table = EditRecord({0: edits}), EditTable([RowTable(edits)])
    record.begin()
    with torch.inference_mode(), NoHostReads():
        changed = table(states()[None], None, record.of(table))
        told = record.taken(0, range(len(states())))
    assert told.shape == (len(states()), N_TOLD * len(edits))
    assert float(told[:, N_TOLD - 1 :: N_TOLD].max()) == pytest.approx(0.2, rel=1e-4)
    assert not torch.equal(changed, states()[None])


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_where_a_source_normalises_no_dose_is_known_which_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalisation: str
) -> None:
    models.save("llama", tmp_path / "model")
    write_sae(tmp_path / "saes" / SAE, "jumprelu", "blocks.1.hook_resid_post", normalisation)
    clamp = {"do": "clamp", "feature": f"{SAE}/3", "amount": 2}
    asked = {"max_new_tokens": 2, "compare": False}
    with served(tmp_path) as (client, runtime):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "_submit", None)
            refused = {"edits": [clamp], "max_dose": {"value": 9, "then": "refuse"}}
            with pytest.raises(InvalidRequest, match=f"edits.0: max_dose: source '{SAE}' normalises what it reads"):
                client.steer("the cat", **refused, **asked)
            with pytest.raises(InvalidRequest, match=f"edits.0: Source '{SAE}' normalises what it reads, so that no"):
                client.steer("the cat", edits=[{**clamp, "unit": "dose"}], **asked)
        bound = {"value": 9, "then": "clamp"}
        receipt = client.steer("the cat", edits=[clamp], max_dose=bound, receipt=True, **asked).receipt
    assert receipt is not None
    assert receipt["edits"][0]["acted"], "the control: where the bound is on what is written, it steers"
