"""SAEs that are large on paper: files with holes, of which the weights of a few features are written."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

WIDTH, FEATURES = 2560, 65536
SHAPES = {
    "W_dec": (FEATURES, WIDTH),
    "W_enc": (WIDTH, FEATURES),
    "b_dec": (WIDTH,),
    "b_enc": (FEATURES,),
    "threshold": (FEATURES,),
}
ITEM = 4


def starts() -> dict[str, int]:
    """Where in the file each tensor begins."""
    header, _ = _header()
    place, found = len(header), {}
    for name, shape in SHAPES.items():
        found[name] = place
        place += ITEM * math.prod(shape)
    return found


def write(folder: Path, hook: str, features: Iterable[int]) -> Path:
    """A JumpReLU SAE of 1.3 GB in float32, as SAELens writes them; weights are random where `features` have them."""
    folder.mkdir(parents=True)
    config = {
        "architecture": "jumprelu",
        "d_in": WIDTH,
        "d_sae": FEATURES,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": hook, "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    header, n_bytes = _header()
    begins = starts()
    with (folder / "sae_weights.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + n_bytes)
        for index in features:
            made = np.random.default_rng(index)
            file.seek(begins["W_dec"] + ITEM * index * WIDTH)
            file.write(made.standard_normal(WIDTH, dtype=np.float32).tobytes())
            for row, number in enumerate(made.standard_normal(WIDTH, dtype=np.float32)):
                file.seek(begins["W_enc"] + ITEM * (row * FEATURES + index))
                file.write(number.tobytes())
    return folder


def _header() -> tuple[bytes, int]:
    """With its length before it; and the bytes of the tensors."""
    about, end = {}, 0
    for name, shape in SHAPES.items():
        begin, end = end, end + ITEM * math.prod(shape)
        about[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(about).encode()
    return struct.pack("<Q", len(text)) + text, end
