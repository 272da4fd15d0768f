"""Transcoders from their folders: features are set from a request, where the configuration says that they write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from copy import deepcopy

import pytest

from neuronpedia_inference.edits.plan import Do, Edit, Feature, Plan
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import models
from tests.edits_by_hand import READS, TRANSCODERS, WIDTH, Hand, greedy, sae
from tests.engine.test_models_start import written

LAYER, WRITES = 1, "hook_mlp_out"
AMOUNT = 60.0


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    folder = models.save("llama", tmp_path_factory.mktemp("model"))
    saes = tmp_path_factory.mktemp("saes")
    for kind in TRANSCODERS:
        of = deepcopy(sae(kind))
        of.cfg.metadata.hook_name = f"blocks.{LAYER}.{READS}"
        of.cfg.metadata.hook_name_out = f"blocks.{LAYER}.{WRITES}"
        of.save_model(saes / f"{LAYER}-{kind}")
    mute = deepcopy(sae("transcoder"))
    mute.cfg.metadata.hook_name = f"blocks.{LAYER}.{READS}"
    mute.save_model(saes / f"{LAYER}-mute")
    loaded = Runtime.load(
        Settings.read(
            model_id=str(folder),
            local_sae_dir=saes,
            sae_sets=(*TRANSCODERS, "mute"),
            num_threads=1,
            max_tokens=300,
        )
    )
    yield loaded
    loaded.close()


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_a_feature_is_read_where_it_reads_and_written_where_it_writes(runtime: Runtime, kind: str) -> None:
    """Everywhere but at position 0, with and without reading it, beside the model as it is."""
    prompt = runtime.tokenize("The cat sat.", "once")
    feature = Feature(f"{LAYER}-{kind}", 3)
    plans = [Plan((Edit(do, feature, AMOUNT),)) for do in (Do.CLAMP, Do.ADD)]
    clamped, added, plain = asyncio.run(written(runtime, prompt, [*plans, None], 8))
    of = sae(kind)
    ways = {
        clamped: Hand(Do.CLAMP, LAYER, WRITES, AMOUNT, of=of, index=3, chosen=lambda at, token, n: float(at > 0)),
        added: Hand(Do.ADD, LAYER, WRITES, AMOUNT, of=of, index=3),
    }
    assert of.cfg.d_in == WIDTH
    for tokens, hand in ways.items():
        assert list(tokens) == greedy("llama", [hand], prompt.ids, len(tokens))
        assert tokens != plain


def test_one_that_does_not_say_where_it_writes_is_refused(runtime: Runtime) -> None:
    for do in (Do.CLAMP, Do.ADD):
        with pytest.raises(InvalidRequest, match="'1-mute' is a transcoder, .* does not say where"):
            asyncio.run(runtime.check_steering(Plan((Edit(do, Feature("1-mute", 3), AMOUNT),))))
