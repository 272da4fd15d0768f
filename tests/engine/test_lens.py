"""Lens rows in a batch against the same by hand; Jacobians from their files; tokens by their text."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neuronpedia_inference.costs import READ_OUT_AT_ONCE, READ_OUT_BYTES
from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.protocol import NO_TOKEN, RowId, RowSpec, RowStep
from neuronpedia_inference.engine.readout import Readout
from neuronpedia_inference.engine.tokens import TextCodec
from neuronpedia_inference.engine.tree import Tree
from neuronpedia_inference.engine.vocabulary import Vocabulary
from neuronpedia_inference.errors import NoJacobianLens, StartupError
from neuronpedia_inference.lenses.jacobians import Jacobians, read_jacobians
from neuronpedia_inference.points import Point
from neuronpedia_inference.watches.readings import LensReading
from tests import models
from tests.allocation import allocated_at_the_peak
from tests.engine.engines import engine
from tests.engine.test_merging import PROMPTS
from tests.steps import result_of

WIDTH, N = 32, 4
JACOBIAN = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
LEFT_OUT = torch.arange(models.VOCAB_SIZE) % 3 > 0
HANDICAP = torch.zeros(models.VOCAB_SIZE).masked_fill(LEFT_OUT, -torch.inf)
SHARE = 1e-4


def reading(built: ModelEngine, **how: Any) -> LensReading:
    return LensReading(built.readout, models.VOCAB_SIZE, N, **how)


def logits_by_hand(family: str, hidden: Tensor) -> Tensor:
    net: Any = models.model(family)
    norm = next(getattr(net.base_model, name) for name in ("norm", "ln_f") if hasattr(net.base_model, name))
    with torch.no_grad():
        logits = net.get_output_embeddings()(norm(hidden[None]))[0]
    cap = getattr(net.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("first", [False, True])
def test_a_lens_through_a_jacobian_tells_words_and_the_likeliest(family: str, first: bool) -> None:
    hidden = models.read(models.model(family), family, PROMPTS[0], 1, "hook_resid_post")
    with torch.no_grad():
        found = reading(engine(family), jacobian=JACOBIAN.half(), handicap=HANDICAP, keeps_first=first)(hidden)
    logits = logits_by_hand(family, hidden @ JACOBIAN.half().float().T)
    ranked = logits.masked_fill(LEFT_OUT, -torch.inf)
    if first:
        ranked.scatter_(1, logits.argmax(-1, keepdim=True), torch.inf)
    ids = ranked.topk(N).indices
    wanted = logits.log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(found[:, N:], wanted, rtol=SHARE, atol=SHARE * float(logits.abs().max()))
    assert not LEFT_OUT[found[:, 1:N].long()].any()
    assert bool(LEFT_OUT[ids[:, 0]].any()) is first
    if first:
        assert torch.equal(found[:, 0].long(), logits.argmax(-1))


@pytest.mark.parametrize("n_positions", [1, 9, 10, 11, 23])
def test_many_positions_are_read_in_even_parts(n_positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuronpedia_inference.watches.readings.READ_OUT_AT_ONCE", 10 * models.VOCAB_SIZE)
    built, parts = engine("llama"), list[int]()

    def readout(piece: Tensor) -> Tensor:
        parts.append(len(piece))
        return built.readout(piece)

    hidden = torch.randn(n_positions, WIDTH, generator=torch.Generator().manual_seed(n_positions))
    with torch.no_grad():
        found = LensReading(readout, models.VOCAB_SIZE, N)(hidden)
        wanted = logits_by_hand("llama", hidden).log_softmax(-1).topk(N)
    assert sum(parts) == n_positions
    assert len(parts) == math.ceil(n_positions / 10)
    assert max(parts) - min(parts) <= 1
    assert torch.equal(found[:, :N].long(), wanted.indices)
    torch.testing.assert_close(found[:, N:], wanted.values, rtol=SHARE, atol=SHARE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_reading_out_stays_within_what_is_admitted(family: str, dtype: torch.dtype) -> None:
    """In gemma2 logits are capped."""
    net: Any = deepcopy(models.model(family))
    tree = Tree(net.to(dtype))
    hidden = torch.randn(4000, WIDTH, dtype=dtype)
    n_vocab = models.VOCAB_SIZE
    lens = LensReading(Readout(tree), n_vocab, N, handicap=HANDICAP, keeps_first=True)
    admitted = READ_OUT_BYTES * min(len(hidden) * n_vocab, READ_OUT_AT_ONCE)
    assert allocated_at_the_peak(lambda: lens(hidden)) <= admitted + hidden.nbytes


def steps_of(built: ModelEngine, rows: list[RowSpec], n_steps: int) -> list[list[RowStep]]:
    """Of every row, in one batch."""
    steps = built.lane.prefill([(RowId(0, place), row) for place, row in enumerate(rows)])
    for _ in range(n_steps):
        steps += built.lane.decode()
    built.lane.drop(built.lane.rows)
    return [[step for step in steps if step.row.place == place] for place in range(len(rows))]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_only_read_share_a_pass_and_draw_nothing(family: str) -> None:
    """Beside rows that generate, of other lengths; each has what it has alone, from its first position that is read."""
    built = engine(family)
    watches = tuple(built.watch(Point(layer, "hook_resid_post"), reading(built)) for layer in (0, 2))
    reads = [RowSpec(PROMPTS[place], Sampling(0), watches=watches, weight=3.0) for place in (0, 3)]
    reads[1] = replace(reads[1], read_from=2)
    writes = RowSpec(PROMPTS[2], Sampling(4))
    with torch.inference_mode():
        together = steps_of(built, [reads[0], writes, reads[1]], 4)
        alone = [steps_of(built, [row], 4)[0] for row in (reads[0], writes, reads[1])]
    assert [step.token_id for step in together[1]] == [step.token_id for step in alone[1]]
    for mine, own, row in ((together[0], alone[0], reads[0]), (together[2], alone[2], reads[1])):
        [step], [single] = mine, own
        assert (step.token_id, step.finish_reason, step.ends) == (NO_TOKEN, "length", True)
        assert step.numbers is not None
        assert single.numbers is not None
        assert step.numbers.shape == (len(row.prompt_ids) - row.read_from, 4 * N)
        hidden = models.read(models.model(family), family, row.prompt_ids, 2, "hook_resid_post")[row.read_from :]
        wanted = logits_by_hand(family, hidden).log_softmax(-1).topk(N).values.numpy()
        np.testing.assert_allclose(step.numbers[:, -N:], wanted, rtol=SHARE, atol=SHARE * float(np.abs(wanted).max()))
        np.testing.assert_allclose(step.numbers[:, -N:], single.numbers[:, -N:], rtol=SHARE, atol=SHARE)


# Files


def read(file: Path, cache: Path, **how: Any) -> Jacobians:
    size = {"n_layers": 3, "d_model": WIDTH, "device": torch.device("cpu"), **how}
    return read_jacobians(file, **size, cache_dir=cache)


def published(**changes: Any) -> dict[str, Any]:
    """As Neuronpedia publishes them."""
    return {"J": {0: JACOBIAN.half(), 2: JACOBIAN.half()}, "d_model": WIDTH, "n_prompts": 1000, **changes}


def test_a_published_file_is_rewritten_once(tmp_path: Path) -> None:
    torch.save(published(provenance={"capture": "resid_post"}), tmp_path / "m_jacobian_lens.pt")
    found = read(tmp_path / "m_jacobian_lens.pt", tmp_path)
    assert found.layers == [0], "of the last block none is used"
    assert torch.equal(found.by_layer[0], JACOBIAN.half())
    assert (found.about["n_prompts"], "resid_post" in found.about["provenance"]) == ("1000", True)
    [copy] = (tmp_path / "lenses").iterdir()
    written = copy.stat().st_mtime_ns
    assert torch.equal(read(tmp_path / "m_jacobian_lens.pt", tmp_path).by_layer[0], JACOBIAN.half())
    assert torch.equal(read(copy, tmp_path).by_layer[0], JACOBIAN.half())
    assert copy.stat().st_mtime_ns == written


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"J": Harmful(tmp_path / "trace")}, protocol=2))
    torch.save({"J": Harmful(tmp_path / "trace")}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        with pytest.raises(StartupError, match="cannot be read"):
            read(tmp_path / name, tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("matrices", "said"),
    [
        ({"0": torch.zeros(4, 4)}, "are of another model: block 0 has one of shape"),
        ({"3": JACOBIAN}, "are of another model: block 3"),
        ({"0": JACOBIAN * torch.inf}, "not finite, in block 0"),
        ({"2": JACOBIAN}, "of no block but the last"),
        ({"blocks.0": JACOBIAN}, "'blocks.0' is no number of a block"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path: Path, matrices: dict[str, Tensor], said: str) -> None:
    save_file({name: one.contiguous() for name, one in matrices.items()}, tmp_path / "lens.safetensors")
    with pytest.raises(StartupError, match=said):
        read(tmp_path / "lens.safetensors", tmp_path)


def test_where_there_are_none_it_is_said_why() -> None:
    with pytest.raises(NoJacobianLens) as caught:
        Jacobians(off_because="nobody has fitted any").check()
    assert caught.value.beside == {"status": "unavailable", "detail": "nobody has fitted any"}


def test_a_token_is_found_by_its_text_or_without_its_blanks() -> None:
    codec = TextCodec(models.tokenizer())
    words = result_of(Vocabulary.read(codec, models.VOCAB_SIZE))
    assert [words.strings[token] for token in range(4)] == [models.BOS, "<|eos|>", "<|x|>", "<|y|>"]
    by_text = {words.strings[token]: token for token in reversed(range(models.VOCAB_SIZE))}
    for text in ("a", " ", "7", models.BOS):
        assert words.find(text) == by_text[text]
    assert words.find(" a\n") == words.find("a")
    assert words.find("ab") is None
    assert words.is_word[by_text["a"]]
    assert not words.is_word[[0, by_text["."], by_text[" "]]].any()
