"""What `docs/reference.md` says of the SAEs that can be served: their names, their number, and which are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neuronpedia_inference.saes import listed
from neuronpedia_inference.saes.foreign import CLASSES
from neuronpedia_inference.saes.listed import ListedSae

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

TEXT = """\
SAELens's directory lists {n} SAEs of {models} models. Each has one name under its model:

- **Its Neuronpedia id** where it has one: `20-gemmascope-res-16k`, of the set `gemmascope-res-16k`.
- **Else a derived name**, `{{layer}}-{{release}}__{{the rest of the id}}`: `layer_17_width_16k_l0_big` of the release
  `gemma-scope-2-4b-pt-res-all` is `17-gemma-scope-2-4b-pt-res-all__width_16k_l0_big`. The layer is `e` for embeddings;
  what is no letter, digit, dot or underscore becomes `-`; and where nothing is left, so are the two underscores:
  `0-qwen-scope-3.5-27b-w80k-l50`. It is made from release and id alone, so no other entry can change it.

A set is everything behind the first hyphen; its sources sort by layer. A finetuned model offers its base model's sets
too, marked as such; where both have a set of one name, the base's goes by the derived one. Two entries carry another
SAE's Neuronpedia id: that of `pythia-70m-deduped-res-sm` is named `e-res-sm` here, layer 2 of `gemma-scope-9b-pt-res`
with L0 8 has its derived name. `gemma-scope-9b-it-res` is listed under `gemma-2-9b-it`, on which it was trained.

`SAE_SETS` takes sets, single sources, and where an SAE is: `release/sae_id` in SAELens's names, `hf://owner/repo/path`
for a folder on the hub, and a local folder, written with `/`, `./`, `../` or `~` in front. With `NAME=` before it the
SAE goes by that name, as in `7-mine=hf://me/my-saes/final`. Requests name sets and sources only. Such folders may be:

- **SAELens's**, of any version: `cfg.json` and `sae_weights.safetensors`.
- **EleutherAI's sparsify**: `cfg.json` and `sae.safetensors`, in a folder called by the module whose output it reads:
  `layers.5`, `layers.5.mlp`, `h.5.attn`. Transcoders, skip connections, `signed` and `groupmax` are refused.
- **dictionary_learning's**: `config.json` and `ae.pt`, of the classes {classes}. `submodule_name` may be the residual
  stream, an MLP or an attention. Converted once, into the cache folder.

An SAE on what an MLP or an attention gives is refused where the model has a norm behind that (Gemma 2 and 3, OLMo 2).

An SAE may ask for more of its model than a hook. With `center_writing_weights` (gpt2-small's `res-jb` and `mlp-tm`) it
reads a residual stream without its mean over d_model. The model's weights stay as they are, and the SAE's encoder
columns are centred instead, which reads the same; what is added to the stream has the same effect in both.
`prepend_bos: false`, a `revision` and other options of loading are said at start and in `/v1/capabilities`
(`sources_ask_for`). Norms or value biases that are to be folded where that changes what is read, centred weights for
a gated SAE or for a model with RMS norms, and activations other than ReLU and TopK are refused at start.

Where SAE_SETS is unset, a model of the directory gets a set on its residual stream (`hook_resid_pre` or
`hook_resid_post`). The model's own come before its base's; those with Neuronpedia ids that have no suffix `__...`
before others; then that of most layers, the narrowest, the first. A model without any says so and does not start
before SAE_SETS is given.

{formats}

Not served, and listed with the reason by `neuronpedia-inference models MODEL`:

{refusals}"""


def saes(table: Table) -> str:
    every = [sae for model in listed.models() for sae in listed.of_model(model)]
    groups: dict[str, list[ListedSae]] = {}
    for sae in every:
        groups.setdefault(sae.loader or "sae_lens", []).append(sae)
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = [(f"`{name}`", *_counts(group)) for name, group in largest_first]
    reasons = [(why, [sae for sae in every if why in (sae.refused, sae.limited)]) for why in listed.REASONS]
    return TEXT.format(
        classes=", ".join(f"`{name}`" for name in CLASSES),
        n=len(every),
        models=len(listed.models()),
        formats=table(
            ("format, by SAELens's name", "SAEs", "with a Neuronpedia id", "served"), [*rows, ("all", *_counts(every))]
        ),
        refusals=table(
            ("SAEs", "releases", "why"), [(str(len(group)), _releases(group), why) for why, group in reasons]
        ),
    )


def _counts(group: Sequence[ListedSae]) -> tuple[str, str, str]:
    named = sum(sae.neuronpedia_id is not None for sae in group)
    return str(len(group)), str(named), str(sum(sae.refused is None for sae in group))


def _releases(group: Sequence[ListedSae]) -> str:
    return ", ".join(dict.fromkeys(f"`{sae.release}`" for sae in group))
