"""What is read without SAELens is what SAELens reads, bit for bit; what is not wholly understood is left to it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronpedia_inference.embedded import SOURCES, sae_dir
from neuronpedia_inference.saes.load import load_on_host, place_on_device
from neuronpedia_inference.saes.plain import PlainSae, plain_config
from neuronpedia_inference.saes.specs import from_folder

D_IN, D_SAE = 16, 24
CONFIG: dict[str, Any] = {
    "architecture": "jumprelu",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.54.12"},
}


def write(folder: Path, config: dict[str, Any], **more: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "W_enc": (D_IN, D_SAE),
        "W_dec": (D_SAE, D_IN),
        "b_enc": (D_SAE,),
        "b_dec": (D_IN,),
        "threshold": (D_SAE,),
    }
    if config["architecture"] == "standard":
        del shapes["threshold"]
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir()
    save_file({**tensors, **more}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def by_saelens(folder: Path, dtype: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a deprecated module of TransformerLens
        from sae_lens import SAE

        sae = SAE.load_from_disk(folder, device="cpu", dtype=dtype)
    sae.fold_W_dec_norm()
    return sae


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("applies", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_it_is_what_saelens_reads(kind: str, applies: bool, dtype: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "3-res", {**CONFIG, "architecture": kind, "apply_b_dec_to_input": applies})
    ours, theirs = load_on_host(from_folder(folder), dtype=dtype), by_saelens(folder, dtype)
    assert isinstance(ours.module, PlainSae)
    x = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.encode(x).float()
        assert 0 < (expected != 0).float().mean() < 0.9
        assert torch.equal(ours.encode(x), expected)
        assert torch.equal(ours.decoder_row(5), theirs.W_dec[5].float())
        copy = place_on_device(ours, "cpu")
        assert torch.equal(copy.encode(x), expected)
        ours.free()
        assert torch.equal(copy.encode(x), expected)
    assert (ours.source.architecture, ours.source.n_features, ours.source.width) == (kind, D_SAE, D_IN)
    raw = load_file(folder / "sae_weights.safetensors")["W_dec"]
    assert not torch.equal(raw.norm(dim=1), torch.ones(D_SAE))  # so that folding was needed, and the file is as before


@pytest.mark.parametrize(
    "change",
    [
        {"normalize_activations": "layer_norm"},
        {"reshape_activations": "hook_z"},
        {"activation_fn": "relu"},
        {"apply_b_dec_to_input": 1},
        {"d_sae": 24.0},
        {"architecture": "topk", "k": 3},
        {"architecture": ["jumprelu"]},
        {"metadata": {"hook_name": "blocks.3.hook_resid_post"}},
        {"metadata": {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "5.3.0"}},
        {"metadata": None},
    ],
)
def test_what_is_not_wholly_understood_is_left_to_saelens(change: dict[str, Any]) -> None:
    assert plain_config(CONFIG) is not None
    assert plain_config(CONFIG | change) is None
    assert plain_config({key: value for key, value in CONFIG.items() if key not in change}) is None or (
        change.keys() <= {"reshape_activations", "activation_fn"}
    )


def test_other_tensors_than_the_configuration_says_are_left_to_saelens(tmp_path: Path) -> None:
    folder = write(tmp_path / "3-res", CONFIG, scaling_factor=torch.ones(D_SAE))
    assert not isinstance(load_on_host(from_folder(folder), dtype="float32").module, PlainSae)


def test_the_embedded_saes_need_no_saelens() -> None:
    program = (
        "import sys\n"
        "from neuronpedia_inference.saes.load import load_on_host\n"
        "from neuronpedia_inference.saes.specs import from_folder\n"
        "from pathlib import Path\n"
        "for folder in sys.argv[1:]: load_on_host(from_folder(Path(folder)), dtype='float32')\n"
        "assert not {'sae_lens', 'transformer_lens', 'datasets'} & set(sys.modules)\n"
    )
    folders = [str(sae_dir(source)) for source in SOURCES]
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
