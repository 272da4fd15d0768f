"""Which tensor of an SAE lies where, format by format: those of SAELens, and originals on the hub in safetensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuronpedia_inference.saes.kinds import ATTENTION, SCALED_BY_NORMS
from neuronpedia_inference.saes.layout import Layout, Part
from neuronpedia_inference.saes.specs import WEIGHTS_NAME
from neuronpedia_inference.saes.stored import tensors_in

KNOWN = {"W_enc", "W_dec", "W_skip", "b_dec", "r_mag", *SCALED_BY_NORMS}
_GEMMA = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
_LINEAR = {"encoder.bias": "b_enc", "decoder.bias": "b_dec"}
_TEMPORAL = {"D": "W_dec", "E": "W_enc", "b": "b_dec"}
_TURNED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}


def folder_layout(folder: Path) -> Layout | None:
    """Of an SAE that SAELens wrote; None if its file holds what is not read here. Raises OSError or ValueError."""
    return _known({name: Part(stored) for name, stored in tensors_in(folder / WEIGHTS_NAME).items()})


def original_layout(loader: str, snapshot: Path, path: str, scale: float | None) -> Layout | None:
    """Of an original at `path` in a repository's cache; None where the format is no safetensors.

    loader: SAELens's name for the format. scale: the directory's factor for inputs. Raises OSError or ValueError.
    """
    match loader:
        case "gemma_3":
            return _gemma(snapshot / path / "params.safetensors")
        case "llama_scope":
            about = _config(snapshot / path / "hyperparams.json")
            norm = about["d_model"] ** 0.5 / about["dataset_average_activation_norm"]["in"]
            parts = _linear(snapshot / path / "checkpoints" / "final.safetensors")
            return Layout(parts, threshold=about["jump_relu_threshold"] * norm, scale=scale)
        case "llama_scope_r1_distill":
            return Layout(_linear(snapshot / path / WEIGHTS_NAME), scale=scale)
        case "mwhanna_transcoder":
            parts = {name: Part(stored) for name, stored in tensors_in(snapshot / path).items()}
            return _known(parts | {"W_enc": replace(parts["W_enc"], is_turned=True)})
        case "sparsify":
            return _sparsify(snapshot / path / "sae.safetensors")
        case "mntss_clt_layer_transcoder":
            return _one_layer(snapshot, path)
        case "temporal":
            found = tensors_in(snapshot / path / "latest_ckpt.safetensors")
            return _known({_TEMPORAL.get(name, name): Part(stored) for name, stored in found.items()})
    return None


def _known(parts: dict[str, Part]) -> Layout | None:
    return Layout(parts) if all(name in KNOWN or name.startswith(ATTENTION) for name in parts) else None


def _gemma(file: Path) -> Layout:
    found = tensors_in(file)
    parts = {ours: Part(found[theirs]) for theirs, ours in _GEMMA.items()}
    if "affine_skip_connection" in found:
        parts["W_skip"] = Part(found["affine_skip_connection"], is_turned=True)
    return Layout(parts)


def _linear(file: Path) -> dict[str, Part]:
    """Of torch's linear layers, whose weights are [out, in]."""
    found = tensors_in(file)
    parts = {ours: Part(found[theirs]) for theirs, ours in _LINEAR.items()}
    parts |= {ours: Part(found[theirs], is_turned=True) for theirs, ours in _TURNED.items()}
    if "log_jumprelu_threshold" in found:
        parts["threshold"] = Part(found["log_jumprelu_threshold"], is_log=True)
    return parts


def _sparsify(file: Path) -> Layout:
    found = tensors_in(file)
    parts = {
        "W_enc": Part(found["encoder.weight"], is_turned=True),
        "b_enc": Part(found["encoder.bias"]),
        "W_dec": Part(found["W_dec"]),
        "b_dec": Part(found["b_dec"]),
    }
    return Layout(parts)


def _one_layer(snapshot: Path, layer: str) -> Layout:
    encoder = tensors_in(snapshot / f"W_enc_{layer}.safetensors")
    decoder = tensors_in(snapshot / f"W_dec_{layer}.safetensors")
    return Layout(
        {
            "W_enc": Part(encoder[f"W_enc_{layer}"], is_turned=True),
            "b_enc": Part(encoder[f"b_enc_{layer}"]),
            "b_dec": Part(encoder[f"b_dec_{layer}"]),
            "W_dec": Part(decoder[f"W_dec_{layer}"], is_summed=True),
        }
    )


def _config(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
