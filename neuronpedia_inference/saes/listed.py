"""What SAELens's directory says of each of its SAEs without any of their files: a name, where it reads, how wide it is.

An SAE is named by its Neuronpedia id, `20-gemmascope-res-16k`, where it has one. Every SAE also has a name derived from
release and id alone, `{layer}-{release}__{the rest of the id}`, which no other entry can change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache

from neuronpedia_inference.domain import TEMPORAL
from neuronpedia_inference.saes.directory import Release, releases

EMBEDDING = "e"
"""Stands for the layer in the name of an SAE that reads the embeddings."""

EMBEDDED_TOKENS = "it reads hook_embed, the embeddings before they are scaled, which is no place in a block"
REFUSALS = (EMBEDDED_TOKENS,)
"""Every reason for which an SAE of the directory is not served."""
ACROSS_LAYERS = (
    "activations only: its decoder writes to every later layer, so it has no rows to compare or to steer with"
)
WHOLE_TEXTS = (
    "of whole texts only: its encoder attends to earlier tokens, so its features are not watched while a text is "
    "written, and not set to a value"
)
REASONS = (*REFUSALS, ACROSS_LAYERS, WHOLE_TEXTS)
"""Why all of an SAE, or a part, is not served."""

_TRUE_MODEL = {"gemma-scope-9b-it-res": "gemma-2-9b-it"}
"""Releases that the directory lists under another model than their SAEs were trained on."""
_TRUE_NAME: dict[tuple[str, str], str | None] = {
    ("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_pre"): "e-res-sm",
    ("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8"): None,
}
"""Where the directory gives an SAE the Neuronpedia id of another."""

_LAYER = re.compile(r"blocks\.(\d+)\.|layer_?(\d+)|\bl(\d+)(?=[arm]_)")
_WIDTH = re.compile(
    r"(?<![a-z0-9])w?(4k|16k|24k|32k|6[45]k|80k|128k|131k|262k|524k|1m|2pow1\d)(?![a-z0-9])", re.IGNORECASE
)
_THOUSANDS = {"65k": 2**16, "131k": 2**17, "262k": 2**18, "524k": 2**19, "1m": 2**20}
"""Widths that are named by their decimal thousands; the others are named by their binary ones."""
_HOOK = re.compile(r"(?:attn\.|mlp\.)?hook_[a-z]+(?:_[a-z]+)*")
_KINDS = {
    "connor_rob_hook_z": "standard",
    "gemma_2": "jumprelu",
    "goodfire": "standard",
    "deepseek_r1": "standard",
    "llama_scope": "jumprelu",
    "llama_scope_r1_distill": "jumprelu",
    "qwen_scope": "topk",
    "gemma_2_transcoder": "jumprelu_transcoder",
    "mwhanna_transcoder": "transcoder",
    "mntss_clt_layer_transcoder": "cross_layer_transcoder",
    "temporal": TEMPORAL,
}
_KIND_IN_NAME = {"topk": "topk", "gated": "gated", "standard": "standard", "matryoshka": "jumprelu"}
_SUBLAYERS = {"a": "hook_attn_out", "m": "hook_mlp_out", "r": "hook_resid_post"}
_READ = {
    "res": "hook_resid_post",
    "resid_post": "hook_resid_post",
    "att": "attn.hook_z",
    "attn_out": "attn.hook_z",
    "mlp": "hook_mlp_out",
    "mlp_out": "hook_mlp_out",
    "transcoder": "mlp.hook_in",
}


@dataclass(frozen=True, slots=True)
class ListedSae:
    """One SAE of the directory."""

    release: str
    sae_id: str
    model: str
    """As the directory names it, where the directory is right."""
    repo: str
    path: str
    loader: str | None
    name: str
    """The source's: that of Neuronpedia, else derived."""
    derived: str
    neuronpedia_id: str | None
    hook: str | None
    """None where only the SAE's own configuration says it."""
    n_features: int | None
    """None where no name says it."""
    kind: str
    """SAELens's architecture, or "sae" where only the SAE's own configuration says it."""

    @property
    def refused(self) -> str | None:
        """Why it cannot be served, one of `REFUSALS`."""
        return EMBEDDED_TOKENS if self.hook == "hook_embed" else None

    @property
    def limited(self) -> str | None:
        """What of it is not served."""
        return {"cross_layer_transcoder": ACROSS_LAYERS, TEMPORAL: WHOLE_TEXTS}.get(self.kind)

    @property
    def reads_residual(self) -> bool:
        return self.hook is not None and self.hook.endswith(("hook_resid_pre", "hook_resid_post"))


def find(release: str, sae_id: str) -> ListedSae:
    """Raises KeyError for an unknown release or id."""
    return _listed(release, sae_id, releases()[release])


@lru_cache(maxsize=1)
def models() -> tuple[str, ...]:
    """Every model of the directory, in its order."""
    return tuple(dict.fromkeys(_model(release, about) for release, about in releases().items()))


@cache
def of_model(model: str) -> tuple[ListedSae, ...]:
    """The SAEs of a model, in the directory's order; none for one that it does not list."""
    return tuple(
        _listed(release, sae_id, about)
        for release, about in releases().items()
        if _model(release, about) == model
        for sae_id in about.paths
    )


def derived_name(collection: str, sae_id: str) -> str | None:
    """`17-gemma-scope-2-4b-pt-res__width_16k_l0_big` from a release and an id; None where the id names no layer."""
    layer = _LAYER.search(sae_id)
    if layer is None and "embedding" not in sae_id:
        return None
    number = next(filter(None, layer.groups())) if layer else EMBEDDING
    rest = sae_id.split(layer[0] if layer else "embedding", 1)
    parts = (re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-_.") for part in rest)
    plain = "_".join(filter(None, parts))
    return f"{number}-{collection}__{plain}" if plain else f"{number}-{collection}"


def _listed(release: str, sae_id: str, about: Release) -> ListedSae:
    derived = derived_name(release, sae_id)
    assert derived is not None, (release, sae_id)
    neuronpedia_id = about.neuronpedia_ids[sae_id]
    known = neuronpedia_id.rsplit("/", 1)[-1] if neuronpedia_id else None
    name = _TRUE_NAME.get((release, sae_id), known) or derived
    return ListedSae(
        release=release,
        sae_id=sae_id,
        model=_model(release, about),
        repo=about.repo,
        path=about.paths[sae_id],
        loader=about.loader,
        name=name,
        derived=derived,
        neuronpedia_id=neuronpedia_id if name == known else None,
        hook=_hook(sae_id, about),
        n_features=_n_features(sae_id, about, name),
        kind=_kind(sae_id, about, name),
    )


def _model(release: str, about: Release) -> str:
    return _TRUE_MODEL.get(release, about.model)


def _hook(sae_id: str, about: Release) -> str | None:
    """Where the SAE reads, as its loader will say."""
    place = _place(sae_id, about)
    layer = _LAYER.search(sae_id)
    if place is None or layer is None:
        return place
    return f"blocks.{next(filter(None, layer.groups()))}.{place}"


def _place(sae_id: str, about: Release) -> str | None:
    path = about.paths[sae_id]
    match about.loader:
        case "gemma_2":
            return "hook_embed" if "embedding" in path else _READ[about.repo.rsplit("-", 1)[-1]]
        case "gemma_3":
            return _READ[path.split("/", 1)[0].removesuffix("_all")]
        case "gemma_2_transcoder":
            return "ln2.hook_normalized"
        case "mwhanna_transcoder":
            return "mlp.hook_in"
        case "mntss_clt_layer_transcoder":
            return None
        case "llama_scope" | "llama_scope_r1_distill":
            layer = _LAYER.search(sae_id)
            return _SUBLAYERS[sae_id[layer.end()]] if layer else None
        case "dictionary_learning_1" | "qwen_scope" | "goodfire" | "deepseek_r1" | "temporal":
            return "hook_resid_post"
    named = _HOOK.search(sae_id)
    place = named[0] if named else None
    return "attn.hook_z" if place == "hook_z" else place


def _n_features(sae_id: str, about: Release, name: str) -> int | None:
    """The first width that id, repository or name tell."""
    for text in (sae_id, about.repo.rsplit("/", 1)[-1], name):
        if found := _WIDTH.search(text.replace("_", "-")):
            width = found[1].lower()
            if width.startswith("2pow"):
                return 2 ** int(width.removeprefix("2pow"))
            return _THOUSANDS.get(width) or 2**10 * int(width.removesuffix("k"))
    return None


def _kind(sae_id: str, about: Release, name: str) -> str:
    if about.loader == "gemma_3":
        if "transcoder" not in about.paths[sae_id]:
            return "jumprelu"
        return "jumprelu_skip_transcoder" if sae_id.endswith("_affine") else "jumprelu_transcoder"
    if about.loader == "dictionary_learning_1":
        return next((kind for word, kind in _KIND_IN_NAME.items() if f"-{word}-" in name), "sae")
    return _KINDS.get(about.loader or "", "sae")
