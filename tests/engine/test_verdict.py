"""What a probe found is kept, and only for the weights and limits that it was found on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.verdict import VerdictFile
from neuronpedia_inference.points import Point
from tests import models
from tests.engine.engines import engine
from tests.engine.test_merging import alone, ids, staggered, steered_rows


def built(folder: Path, net: torch.nn.Module) -> ModelEngine:
    with torch.inference_mode(False):
        return ModelEngine(net, model_id="llama", name="llama", stop_ids=(), cache_dir=folder)  # pyright: ignore[reportArgumentType]


def test_a_kept_verdict_takes_the_place_of_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(tmp_path, models.model("llama"))
    assert first.verdict == engine("llama").verdict
    monkeypatch.setattr("neuronpedia_inference.engine.engine.probe", None)  # whoever probes again fails
    second = built(tmp_path, models.model("llama"))
    assert second.verdict == first.verdict
    rows = steered_rows("llama", ["hook_attn_out", "hook_resid_mid"])
    for row, steps in zip(rows, staggered(second.lane, rows, 3), strict=True):
        assert ids(steps) == alone("llama", row)
    changed = copy.deepcopy(models.model("llama"))
    next(changed.parameters()).data[0, 0] += 1
    with pytest.raises(TypeError):
        built(tmp_path, changed)


def test_a_file_that_is_broken_is_written_again(tmp_path: Path) -> None:
    built(tmp_path, models.model("llama"))
    (kept,) = tmp_path.glob("verdict-*.json")
    kept.write_text('{"findings": {"blocks": 3}}', encoding="utf-8")
    assert VerdictFile(tmp_path, models.model("llama"), True, False).read() is None
    assert built(tmp_path, models.model("llama")).verdict.findings[Point(1, "hook_resid_mid")].width == 32
    assert VerdictFile(tmp_path, models.model("llama"), True, False).read() is not None
