"""The comparison with plain Hugging Face: green on models that are right, and red at the place of every fault."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from neuronpedia_inference.checks import Report, self_test, verify
from neuronpedia_inference.checks.report import Check
from neuronpedia_inference.cli import app
from neuronpedia_inference.edits import rows
from neuronpedia_inference.edits.plan import Do, Plan, Step
from neuronpedia_inference.edits.table import EditTable
from neuronpedia_inference.engine import completions, engine, generation, prompts, steered
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.resolving import edits
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import models

D_SAE = 48
ALL = {"capture", "features of 1-res-tiny", "features of 0-gated-tiny", "effect", "merged", "streamed"}
STEERED = {"steered, SIMPLE_ADDITIVE", "steered, ORTHOGONAL_DECOMP", "steered, PROJECTION_CAP"}


def write_sae(folder: Path, kind: str, hook: str, normalisation: str = "none") -> None:
    """Seeded, as SAELens writes it, with decoder rows of other norms than one."""
    generator = torch.Generator().manual_seed(7)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": numbers(32, D_SAE), "W_dec": 3 * numbers(D_SAE, 32), "b_dec": numbers(32)}
    if kind == "gated":
        tensors |= {"b_gate": numbers(D_SAE), "b_mag": numbers(D_SAE), "r_mag": 0.1 * numbers(D_SAE)}
    else:
        tensors |= {"b_enc": numbers(D_SAE), "threshold": numbers(D_SAE).abs()}
    metadata = {"hook_name": hook, "sae_lens_version": "6.0.0", "model_name": "tiny"}
    config = {
        **{"architecture": kind, "d_in": 32, "d_sae": D_SAE, "apply_b_dec_to_input": True, "dtype": "float32"},
        **{
            "device": "cpu",
            "normalize_activations": normalisation,
            "reshape_activations": "none",
            "metadata": metadata,
        },
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))


@contextmanager
def loaded(folder: Path, family: str) -> Iterator[Runtime]:
    models.save(family, folder / "model")
    write_sae(folder / "saes" / "1-res-tiny", "jumprelu", "blocks.1.hook_resid_post")
    write_sae(folder / "saes" / "0-gated-tiny", "gated", "blocks.0.hook_resid_pre")
    settings = Settings.read(model_id=str(folder / "model"), local_sae_dir=folder / "saes", num_threads=1)
    runtime = Runtime.load(settings)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with loaded(tmp_path_factory.mktemp("llama"), "llama") as runtime:
        yield runtime


def wrong(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def test_a_right_engine_is_green_everywhere(llama: Runtime) -> None:
    report = asyncio.run(verify(llama))
    assert {check.name for check in report.checks} == ALL | STEERED
    assert wrong(report) == set(), report
    assert [check.name for check in report.checks if check.skipped] == []
    assert report.passed
    assert report.summary == "All numbers that were compared are right."
    with_a_skip = Report(report.about, [*report.checks, Check("features of x", 0.0, 0.1, "", "it is in no folder")])
    assert with_a_skip.summary == "All numbers that were compared are right. Not compared: 1 checks."
    told = report.to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["about"]["device"] == "cpu"
    asyncio.run(self_test(llama))


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2", "qwen3"])
def test_other_architectures_are_green(tmp_path: Path, family: str) -> None:
    with loaded(tmp_path, family) as runtime:
        report = asyncio.run(verify(runtime))
    # A random model's likeliest token may stay the same whatever is added.
    assert wrong(report) <= {"effect"}, report


Break = Callable[[pytest.MonkeyPatch, Runtime], None]


def stronger(patch: pytest.MonkeyPatch, _: Runtime) -> None:
    right = edits.EditResolver.resolve

    def strong(self: Any, plan: Plan) -> Any:
        return right(self, replace(plan, edits=tuple(replace(edit, amount=1.01 * edit.amount) for edit in plan.edits)))

    patch.setattr(edits.EditResolver, "resolve", strong)


def dropped(patch: pytest.MonkeyPatch, _: Runtime) -> None:
    for module in (generation, prompts):
        patch.setattr(module, "steering_edits", lambda *_: [])


def dropped_while_decoding(patch: pytest.MonkeyPatch, _: Runtime) -> None:
    patch.setattr(generation, "steering_edits", lambda *_: [])


def swapped_in_batches(patch: pytest.MonkeyPatch, _: Runtime) -> None:
    """Each row gets its neighbour's steering."""
    patch.setattr(steered, "EditTable", lambda of, **how: EditTable([*of[1:], of[0]], **how))


def shifted(patch: pytest.MonkeyPatch, _: Runtime) -> None:
    right = engine.ModelEngine.of_prompt
    patch.setattr(engine.ModelEngine, "of_prompt", lambda *args: right(*args).roll(1, 0))


def other_cap(patch: pytest.MonkeyPatch, _: Runtime) -> None:
    right = rows.step_of

    def loose(do: Do, amount: float) -> Step:
        step = right(do, amount)
        return step._replace(hi=step.hi + 0.1)

    patch.setattr(rows, "step_of", loose)


def unanswered(patch: pytest.MonkeyPatch, _: Runtime) -> None:
    """The smaller of what is and what may be becomes the larger."""
    patch.setattr(torch, "minimum", torch.maximum)


def other_bias(patch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    with runtime.shelf._store.lease("1-res-tiny") as reader:
        bias = reader.module.b_enc  # pyright: ignore[reportAttributeAccessIssue]
        patch.setattr(bias, "data", bias.data + 0.01)


def other_weights(patch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    """A product that loses a little, in one layer."""
    block: Any = runtime._engine.decoder.tree.blocks[1]
    layer = block.mlp.down_proj
    right = layer.forward
    patch.setitem(layer.__dict__, "forward", lambda x: 1.001 * right(x))


def words_lost(patch: pytest.MonkeyPatch, _: Runtime) -> None:
    patch.setattr(completions.TextStream, "push", lambda *_: "")
    patch.setattr(completions.TextStream, "rest", lambda *_: "")


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (stronger, STEERED | {"merged", "streamed"}),
        (dropped, STEERED | {"effect", "merged", "streamed"}),
        (dropped_while_decoding, STEERED | {"merged", "streamed"}),
        (swapped_in_batches, {"merged"}),
        (shifted, {"capture", "features of 1-res-tiny", "features of 0-gated-tiny"}),
        (other_cap, {"steered, PROJECTION_CAP", "merged"}),
        (unanswered, {"steered, PROJECTION_CAP", "merged"}),
        (other_bias, {"features of 1-res-tiny"}),
        (other_weights, {"capture", "features of 1-res-tiny", "merged", "streamed"} | STEERED),
        (words_lost, {"streamed"}),
    ],
)
def test_a_broken_engine_is_red_where_it_is_broken(
    llama: Runtime, monkeypatch: pytest.MonkeyPatch, fault: Break, named: set[str]
) -> None:
    with monkeypatch.context() as patch:
        fault(patch, llama)
        report = asyncio.run(verify(llama))
    assert not report.passed
    assert wrong(report) >= named, report
    quiet = {"capture"} | {f"features of {source.name}" for source in llama.shelf.sources}
    if fault in (stronger, dropped, dropped_while_decoding, other_cap, words_lost, swapped_in_batches):
        assert not wrong(report) & quiet
    if fault is other_bias:
        assert wrong(report) == named


@pytest.mark.parametrize("fault", [dropped, shifted, stronger])
def test_a_broken_engine_does_not_serve(llama: Runtime, monkeypatch: pytest.MonkeyPatch, fault: Break) -> None:
    with monkeypatch.context() as patch:
        fault(patch, llama)
        with pytest.raises(StartupError, match="Self-test failed: ") as failed:
            asyncio.run(self_test(llama))
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("fault", [None, stronger])
def test_the_command_prints_a_report_and_ends_in_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Break | None, as_json: bool
) -> None:
    model, saes = models.save("llama", tmp_path / "model"), tmp_path / "saes"
    write_sae(saes / "1-res-tiny", "jumprelu", "blocks.1.hook_resid_post")
    options = ["--model-id", str(model), "--set", f"LOCAL_SAE_DIR={saes}", "--set", "NUM_THREADS=1"]
    with monkeypatch.context() as patch:
        if fault is not None:
            fault(patch, None)  # pyright: ignore[reportArgumentType]
        ran = CliRunner().invoke(app, ["verify", *options, *(["--json"] if as_json else [])])
    assert ran.exit_code == (0 if fault is None else 1), ran.output
    if as_json:
        told = json.loads(ran.stdout)
        assert told["passed"] == (fault is None)
        assert {check["name"] for check in told["checks"] if check["verdict"] == "WRONG"} >= (
            STEERED if fault else set()
        )
    else:
        assert ("WRONG" in ran.stdout) == (fault is not None)
        assert torch.__version__ in ran.stdout
