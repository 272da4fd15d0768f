"""SAEs of other trainers, as they write them: what each says of itself, in SAELens's words, and its tensors.

    sparsify              {layers.5}/cfg.json, sae.safetensors     TopK of relu((x − b_dec) E + b)      EleutherAI
    dictionary_learning   config.json, ae.pt                       by `dict_class`, as in CLASSES      Marks and others

Both are read without their packages, and nothing in a file is executed. SAELens turns sparsify's decoder, and says of
every dictionary that it reads the residual stream; here what a folder says counts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.saes import saelens
from neuronpedia_inference.saes.asks import MODULE_OUTPUT
from neuronpedia_inference.saes.files import Files
from neuronpedia_inference.saes.layouts import original_layout
from neuronpedia_inference.saes.originals import SPARSIFY
from neuronpedia_inference.saes.specs import CONFIG_NAME

_HOOKPOINT = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.(mlp|attn|attention|self_attn))?")
_SUBMODULE = re.compile(r"(resid|resid_post|mlp|mlp_out|attn|attention|attn_out)(?:_layer_?\d+)?")
_OUTPUTS = {
    None: "hook_resid_post",
    "resid": "hook_resid_post",
    "resid_post": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "mlp_out": "hook_mlp_out",
    "attn": "hook_attn_out",
    "attn_out": "hook_attn_out",
    "attention": "hook_attn_out",
    "self_attn": "hook_attn_out",
}
"""The place that is a module's output, where no norm follows it."""
CLASSES = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
}
"""SAELens's architecture, and whether the decoder's bias is taken off the input."""
_NAMES = {
    "bias": "b_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "encoder.bias": "b_enc",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
_TURNED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
_NO_TENSORS = {"k", "group_sizes"}


def written(files: Files) -> dict[str, Any]:
    """What SAELens's `cfg.json` of it would hold. Raises OSError, or ValueError, KeyError or TypeError for what is not
    served."""
    if files.loader == SPARSIFY:
        return _sparsify(_json(files.folder / CONFIG_NAME), files.folder.name)
    return _dictionary(_json(files.folder / "config.json"))


def config_in(files: Files) -> Any:
    """The same as SAELens's object."""
    return saelens.config_from(written(files))


def sae_in(files: Files, dtype: str) -> Any:
    """The SAE, in host memory, as it lies there. Raises as `written`, and UnpicklingError or RuntimeError."""
    config = written(files)
    if files.loader == SPARSIFY:
        layout = original_layout(SPARSIFY, files.root, files.path, None)
        assert layout is not None, files
        weights = {name: part.whole(getattr(torch, dtype)) for name, part in layout.parts.items()}
    else:
        weights = _dictionary_weights(files.folder / "ae.pt", config["architecture"], config["d_sae"])
    return saelens.sae_from(saelens.config_from(config), weights, dtype)


def _sparsify(config: dict[str, Any], hookpoint: str) -> dict[str, Any]:
    found = _HOOKPOINT.fullmatch(hookpoint)
    if found is None:
        raise ValueError(
            f"its folder is called {hookpoint!r}, and not as the module whose output it reads: layers.5 or layers.5.mlp"
        )
    for name in ("transcode", "skip_connection", "signed"):
        if config.get(name):
            raise ValueError(f"{name} is not served of EleutherAI's sparse coders")
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"its activation {config['activation']!r} is not served")
    d_sae = config.get("num_latents") or config["d_in"] * config["expansion_factor"]
    return _config("topk", config["d_in"], d_sae, found[1], found[2], k=config["k"])


def _dictionary(config: dict[str, Any]) -> dict[str, Any]:
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    kind = trainer["dict_class"]
    if kind not in CLASSES:
        raise ValueError(f"its class {kind!r} is not served ({', '.join(CLASSES)} are)")
    submodule = trainer.get("submodule_name")
    place = _SUBMODULE.fullmatch(submodule) if submodule is not None else None
    if (submodule is not None and place is None) or buffer.get("io", "out") != "out":
        raise ValueError(
            f"it reads {submodule!r}, {buffer.get('io', 'out')!r}, which is not the output of a block's module"
        )
    architecture, applies = CLASSES[kind]
    more = {"k": trainer["k"]} if architecture == "topk" else {}
    sizes = trainer["activation_dim"], trainer["dict_size"]
    return _config(architecture, *sizes, trainer["layer"], place and place[1], applies=applies, **more)


def _config(
    architecture: str, d_in: int, d_sae: int, layer: Any, module: str | None, *, applies: bool = True, **more: Any
) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "d_in": int(d_in),
        "d_sae": int(d_sae),
        "apply_b_dec_to_input": applies,
        "normalize_activations": "none",
        "metadata": {
            "hook_name": f"blocks.{int(layer)}.{_OUTPUTS[module]}",
            MODULE_OUTPUT: True,
            "sae_lens_version": saelens.version(),
        },
        **more,
    }


def _dictionary_weights(file: Path, architecture: str, d_sae: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    weights = {_NAMES.get(name, name): t for name, t in found.items() if name not in (*_TURNED, *_NO_TENSORS)}
    weights |= {ours: found[theirs].T for theirs, ours in _TURNED.items() if theirs in found}
    threshold = weights.pop("threshold", None)
    if architecture == "jumprelu" and threshold is not None:  # TopK has one too, and does without
        weights["threshold"] = threshold.expand(d_sae).clone()
    return weights


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
