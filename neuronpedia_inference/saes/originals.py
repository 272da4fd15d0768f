"""The formats in which SAEs lie on the hub and in folders, and the files that each of them needs."""

from __future__ import annotations

from collections.abc import Callable

from neuronpedia_inference.saes.directory import releases
from neuronpedia_inference.saes.specs import CONFIG_NAME, WEIGHTS_NAME, SourceSpec

SPARSIFY = "sparsify"
DICTIONARY = "dictionary_learning"
FOREIGN = (SPARSIFY, DICTIONARY)
"""Formats of other trainers, which are known by their files where no directory says what a folder is."""

_NEEDED = {
    None: (f"{{path}}/{CONFIG_NAME}", f"{{path}}/{WEIGHTS_NAME}"),
    "connor_rob_hook_z": ("{path}", "{stem}_cfg.json"),
    "deepseek_r1": ("{path}",),
    "dictionary_learning_1": ("{path}/config.json", "{path}/ae.pt"),
    "gemma_2": ("{path}/params.npz",),
    "gemma_2_transcoder": ("{path}/params.npz",),
    "gemma_3": ("{path}/params.safetensors",),
    "goodfire": ("{path}",),
    "llama_scope": ("{path}/hyperparams.json", "{path}/checkpoints/final.safetensors"),
    "llama_scope_r1_distill": ("{path}/config.json", f"{{path}}/{WEIGHTS_NAME}"),
    "mntss_clt_layer_transcoder": ("W_enc_{path}.safetensors", "W_dec_{path}.safetensors", "config.yaml"),
    "mwhanna_transcoder": ("{path}",),
    "qwen_scope": ("{path}",),
    SPARSIFY: (f"{{path}}/{CONFIG_NAME}", "{path}/sae.safetensors"),
    DICTIONARY: ("{path}/config.json", "{path}/ae.pt"),
    "temporal": ("{path}/conf.yaml", "{path}/latest_ckpt.safetensors"),
}
"""By SAELens's name for the format. `path` is the directory's, `stem` the same without its ending."""
_USED = {
    None: ("{path}/sparsity.safetensors",),
    "gemma_3": ("{path}/config.json",),
    "mwhanna_transcoder": ("wandb-config.yaml", "wanb-config.yaml", "config.yaml"),
}
"""Files that are read where a repository has them."""
CONVERTED = frozenset(
    (
        "connor_rob_hook_z",
        "deepseek_r1",
        DICTIONARY,
        "dictionary_learning_1",
        "gemma_2",
        "gemma_2_transcoder",
        "goodfire",
        "qwen_scope",
    )
)
"""Formats of numpy and torch, which are rewritten once."""
SCALED = frozenset(("llama_scope", "llama_scope_r1_distill"))
"""Formats whose inputs the directory scales."""
_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")


def loaders_of(spec: SourceSpec) -> tuple[str | None, ...]:
    """SAELens's names for the formats that it may have, None for SAELens's own; one where the directory says which."""
    return (releases()[spec.release].loader,) if spec.release is not None else (None, *FOREIGN)


def needed_files(loader: str | None, path: str) -> tuple[str, ...]:
    """Names in a repository, without which an SAE at `path` cannot be read."""
    stem = path.split(".pt")[0]
    return tuple(name.format(path=path, stem=stem) for name in _NEEDED[loader])


def all_files(loader: str | None, path: str) -> tuple[str, ...]:
    """Those, and what else is read where it is there."""
    return (*needed_files(loader, path), *(name.format(path=path) for name in _USED.get(loader, ())))


def weight_files(loader: str | None, path: str) -> tuple[str, ...]:
    """The needed ones that hold tensors."""
    return tuple(name for name in needed_files(loader, path) if name.endswith(_WEIGHTS))


def is_converted(name: str) -> bool:
    """Whether a file of this name is rewritten once."""
    return name.endswith(_WEIGHTS[1:])


def loader_among(spec: SourceSpec, path: str, is_there: Callable[[str], bool]) -> str | None:
    """The format all of whose files are there. Raises LookupError for none.

    is_there: by name in the repository.
    """
    for loader in loaders_of(spec):
        if all(map(is_there, needed_files(loader, path))):
            return loader
    raise LookupError


def counted_files(loader: str | None, path: str) -> tuple[tuple[str, ...], int]:
    """Files, and how often the numbers in them are in memory once the SAE is loaded.

    A cross-layer transcoder's decoder has a matrix for each layer that it writes to. Their sum is kept, which is as
    large as the encoder.
    """
    files = weight_files(loader, path)
    return (files[:1], 2) if loader == "mntss_clt_layer_transcoder" else (files, 1)
