"""Jacobians where they may be: in the hub's cache, on a hub, in a folder; read without running what a file holds."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from neuronpedia_inference.embedded.weights import CACHE_VARIABLE
from neuronpedia_inference.jacobian_files import jacobian_file
from neuronpedia_inference.lenses.jacobians import read_jacobians
from neuronpedia_inference.settings import Settings
from tests import models
from tests.engine.test_hub import LAYERS, MODEL_REPO, SAE_REPO, save_as_then, seeded_sae, snapshot, start
from tests.modal.local_modal.hub import a_hub

REPO, DATASET = "neuronpedia/jacobian-lens", "gpt2-small/jlens/Salesforce-wikitext"
NAMES = ("gpt2_jacobian_lens.pt", "gpt2_jacobian_lens_n1000.pt", "a_first.pt")
"""As the wire looks for them, the first of them that is there."""
WIDTH, FITTED = 32, 1


def jacobian(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)).half()


def publish(folder: Path, names: tuple[str, ...]) -> None:
    """Each with another matrix, by its place in `NAMES`."""
    (folder / DATASET).mkdir(parents=True)
    for name in names:
        about = {"J": {FITTED: jacobian(NAMES.index(name))}, "d_model": WIDTH, "n_prompts": 1000}
        torch.save(about, folder / DATASET / name)


def with_model(home: Path) -> Path:
    """The small model and its SAEs, in the hub's cache."""
    models.save("gpt2", snapshot(home / "hub", MODEL_REPO))
    write_saes(snapshot(home / "hub", SAE_REPO))
    return home


def write_saes(folder: Path) -> None:
    for layer in LAYERS:
        save_as_then(seeded_sae(layer), folder / f"blocks.{layer}.hook_resid_pre")


def check_numbers(answered: dict[str, Any], seed: int) -> None:
    """Against plain Hugging Face: what is behind the block, through the matrix, the last norm and the unembedding."""
    net: Any = models.model("gpt2")
    assert answered["lens"]["layers"] == [FITTED, 2]
    hidden = models.read(net, "gpt2", answered["ids"], FITTED, "hook_resid_post")

    def probs(matrix: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = net.lm_head(net.transformer.ln_f(hidden @ matrix.float().T))
        return logits.softmax(-1).topk(3).values

    found = torch.tensor([one[0] for one in answered["lens"]["probs"]])
    torch.testing.assert_close(found, probs(jacobian(seed)), rtol=0, atol=2e-4)
    for other in {0, 1, 2, 3} - {seed}:
        assert not torch.allclose(found, probs(jacobian(other)), rtol=0, atol=2e-4)


@pytest.mark.parametrize("there", [NAMES, NAMES[1:], NAMES[2:]], ids=["named", "n1000", "the first"])
def test_those_in_the_cache_are_found_in_the_order_of_the_wire(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    publish(snapshot(tmp_path, REPO), there)
    file = jacobian_file(Settings.read(model_id="gpt2-small", sae_sets=()), print, asks_hub=False)
    assert str(file).endswith(f"{DATASET}/{there[0]}")
    found = read_jacobians(file, n_layers=3, d_model=WIDTH, device=torch.device("cpu"), cache_dir=tmp_path)
    assert torch.equal(found.by_layer[FITTED], jacobian(NAMES.index(there[0])))


def test_they_come_with_the_model_are_rewritten_once_and_stay(tmp_path: Path) -> None:
    """Nothing is on this machine; afterwards nobody is asked."""
    models.save("gpt2", tmp_path / "model")
    write_saes(tmp_path / "saes")
    publish(tmp_path / "lenses", NAMES)
    (tmp_path / "home").mkdir()
    cache = {CACHE_VARIABLE: str(tmp_path / "ours"), "MODEL_ID": "gpt2-small"}
    repos = {MODEL_REPO: tmp_path / "model", SAE_REPO: tmp_path / "saes", REPO: tmp_path / "lenses"}
    with a_hub(repos) as (address, asked):
        first = start(tmp_path / "home", HF_HUB_OFFLINE="0", HF_ENDPOINT=address, **cache)
    check_numbers(first, 0)
    fetched = {path.rpartition("/")[2] for path in asked if path.startswith(f"/{REPO}/resolve/")}
    assert fetched & {*NAMES} == {NAMES[0]}, "and no other"
    [copy] = (tmp_path / "ours" / "lenses").iterdir()
    with safe_open(copy, framework="pt") as file:
        assert torch.equal(file.get_tensor(str(FITTED)), jacobian(0))
        assert file.metadata()["n_prompts"] == "1000"
    written = copy.stat().st_mtime_ns
    check_numbers(start(tmp_path / "home", **cache), 0)
    assert [one.stat().st_mtime_ns for one in (tmp_path / "ours" / "lenses").iterdir()] == [written]


def test_those_of_a_folder_are_used(tmp_path: Path) -> None:
    """Of what lies there safetensors come first."""
    folder = tmp_path / "mine"
    folder.mkdir()
    torch.save({"J": {FITTED: jacobian(3)}, "d_model": WIDTH, "n_prompts": 1}, folder / "lens.pt")
    settings = Settings.read(model_id="gpt2-small", sae_sets=(), jlens_source=str(folder))
    assert jacobian_file(settings, print, asks_hub=False) == folder / "lens.pt"
    save_file({str(FITTED): jacobian(3)}, folder / "safe.safetensors")
    (folder / "lens.pt").write_bytes(b"not looked at")
    assert jacobian_file(settings, print, asks_hub=False) == folder / "safe.safetensors"
    check_numbers(start(with_model(tmp_path), MODEL_ID="gpt2-small", JLENS_SOURCE=str(folder)), 3)


class Harmful:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(("where", "kind"), [("the hub", "pickle"), ("a folder", "torch")])
def test_what_would_run_code_is_refused_unrun_and_the_rest_is_served(tmp_path: Path, where: str, kind: str) -> None:
    home, trace = with_model(tmp_path), tmp_path / "trace"
    said = {}
    if where == "the hub":
        folder = snapshot(home / "hub", REPO) / DATASET
    else:
        folder, said = tmp_path / "mine", {"JLENS_SOURCE": str(tmp_path / "mine")}
    folder.mkdir(parents=True)
    bad = {"J": {FITTED: jacobian(0)}, "provenance": Harmful(trace)}
    if kind == "torch":
        torch.save(bad, folder / NAMES[0])
    else:
        (folder / NAMES[0]).write_bytes(pickle.dumps({"J": Harmful(trace)}))
    answered = start(home, MODEL_ID="gpt2-small", **said)
    assert answered["lens"]["refused"].startswith("Jacobian lens is not available for this model")
    assert "cannot be read" in answered["lens"]["because"]
    assert answered["generated"][0] != answered["generated"][1], "everything else is served"
    assert not trace.exists()
    pickle.loads(pickle.dumps(Harmful(trace)))  # which would have left it
    assert trace.exists()
