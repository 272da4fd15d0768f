"""What a caller gets, against a plain Hugging Face model with hand-written hooks and SAELens's own `encode`.

The reference never goes through this library: weights, hook, encoding and folding are its own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronpedia_inference import embedded
from neuronpedia_inference.domain import Sampling, Tokens
from neuronpedia_inference.edits.plan import Direction, Do, Edit, Feature, Fires, Plan, Unit
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.points import RESID_POST, WRITABLE, Point
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import models
from tests.engine import seeded_saes
from tests.rounding import CLOSE

SENTENCES = (
    "Hi",
    "The cat sat on the mat.",
    "Paris is the capital of France.",
    "def add(a, b):\n    return a + b",
    "Ünïcödé — 漢字 😀 and tabs\t\there",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    "   leading and trailing spaces   ",
    "WHY ARE YOU SHOUTING?!",
)
MODEL = embedded.MODEL_ID


def prompts() -> list[str]:
    """24 texts of 1 to about 190 tokens: the sentences above, and random walks through them."""
    rng = random.Random(0)
    words = " ".join(SENTENCES).split(" ")
    return [*SENTENCES, *(" ".join(rng.choice(words) for _ in range(n)) for n in range(2, 98, 6))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("saes")
    seeded_saes.write_all(made)
    return made


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Iterator[Runtime]:
    sets = ["res-4k", *(name.split("-")[1] for name in seeded_saes.LAYERS)]
    loaded = Runtime.load(Settings.read(local_sae_dir=folder, sae_sets=tuple(sets), num_threads=1, max_results=5000))
    yield loaded
    loaded.close()


@cache
def plain_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@cache
def plain_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder())


@cache
def hidden_states(prompt: str) -> tuple[tuple[int, ...], dict[int, torch.Tensor]]:
    """Ids with one BOS in front, and resid_post [pos, d_model] of every layer that an SAE reads."""
    ids = plain_tokenizer().encode("<|im_start|>" + prompt)
    seen: dict[int, torch.Tensor] = {}
    layers = {*seeded_saes.LAYERS.values(), 10, 15, 20}
    handles = [
        plain_model().model.layers[n].register_forward_hook(lambda *a, n=n: seen.__setitem__(n, a[2][0].clone()))
        for n in layers
    ]
    with torch.no_grad():
        plain_model()(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return tuple(ids), seen


def expected(source: str, prompt: str, folder: Path) -> torch.Tensor:
    """[pos, d_sae]: SAELens's encode of the SAE as it lies on disk, times its decoder norms (contract 2.5)."""
    trained = source in embedded.SOURCES
    sae = _sae(str(embedded.sae_dir(source) if trained else folder / source))
    hidden = hidden_states(prompt)[1][int(source.split("-")[0])]
    with torch.no_grad():
        return sae.encode(hidden) * _norms(sae)


def borderline(source: str, prompt: str, folder: Path) -> torch.Tensor:
    """[pos, d_sae] bool: JumpReLU features so near their threshold that rounding decides whether they fire."""
    sae = _sae(str(embedded.sae_dir(source) if source in embedded.SOURCES else folder / source))
    if not hasattr(sae, "threshold"):
        return torch.zeros(1, dtype=torch.bool).expand(len(hidden_states(prompt)[0]), sae.cfg.d_sae)
    hidden = hidden_states(prompt)[1][int(source.split("-")[0])]
    with torch.no_grad():
        before = sae.process_sae_in(hidden) @ sae.W_enc + sae.b_enc
        near = (before - sae.threshold).abs() <= 1e-5 * sae.threshold
    assert near.sum() <= 3, "too many to be chance"
    return near


@cache
def _sae(path: str) -> Any:
    return SAE.load_from_disk(path, device="cpu", dtype="float32")


def _norms(sae: Any) -> torch.Tensor:
    """What folding multiplies activations by: nothing for TopK, which rescales by itself or is left unfolded."""
    return torch.ones(()) if hasattr(sae.cfg, "rescale_acts_by_decoder_norm") else sae.W_dec.norm(dim=1)


def ask(runtime: Runtime, operation: str, **body: Any) -> dict[str, Any]:
    return asyncio.run(answer(by_name[operation], {"model": MODEL, **body}, runtime))


def close(values: Any, wanted: torch.Tensor) -> bool:
    """1e-4 relative to the largest value of the prompt's feature vectors."""
    got = torch.tensor(values, dtype=torch.float64)
    return torch.allclose(got, wanted.double(), rtol=1e-4, atol=1e-4 * float(wanted.abs().max().clamp(min=1e-3)))


SOURCES = (*embedded.SOURCES, *seeded_saes.LAYERS)


def shortened(table: Iterable[str], *kept: str) -> list[Any]:
    """The rows of a long table, all but those kept marked `long`."""
    return [pytest.param(row, marks=[] if row in kept else [pytest.mark.long]) for row in table]


@pytest.mark.parametrize("source", shortened(SOURCES, "15-res-4k", "9-btk"))
def test_single_and_top_k_and_source_equal_the_reference(runtime: Runtime, folder: Path, source: str) -> None:
    n_checked = 0
    for prompt in prompts():
        want = expected(source, prompt, folder)
        if len(want) > 200:
            continue
        n_checked += 1
        index = int(want[1:].amax(0).argmax())
        one = ask(runtime, "activation_single", prompt=prompt, source=source, index=str(index))
        assert close(one["activation"]["values"], want[1:, index])
        assert one["activation"]["max_value"] > 0
        top = ask(runtime, "activation_topk_by_token", prompt=prompt, source=source, top_k=4, ignore_bos=False)
        values = [[f["activation_value"] for f in row["top_features"]] for row in top["results"]]
        assert close(values, want.topk(4, dim=1).values)
        for row, features in zip(want, top["results"], strict=True):
            indices = [f["feature_index"] for f in features["top_features"]]
            assert close([f["activation_value"] for f in features["top_features"]], row[indices])
    assert n_checked >= 20


@pytest.mark.parametrize("source", shortened(SOURCES, "15-res-4k", "9-btk"))
def test_active_features_are_exactly_the_non_zero_ones(runtime: Runtime, folder: Path, source: str) -> None:
    for prompt in prompts():
        want = expected(source, prompt, folder)
        found = ask(runtime, "activation_source", prompts=[prompt], source=source)["results"][0]
        got = torch.zeros_like(want)
        for feature, places in found["activeFeatures"].items():
            for position, value in places:
                got[int(position), int(feature)] = value
        want[0] = 0
        got[borderline(source, prompt, folder)] = want[borderline(source, prompt, folder)]
        assert torch.allclose(got, want, rtol=1e-4, atol=6e-4 + 1e-4 * float(want.max()))  # rounded to 3 decimals
        scale = float(want.max())
        assert not ((got > 0) != (want > 0))[(want > 1e-3 * scale) | (got > 1e-3 * scale)].any()


@pytest.mark.parametrize("source_set", ["res-4k", "std", "jump", "topk", "gated", "btk"])
def test_all_features_equal_the_reference(runtime: Runtime, folder: Path, source_set: str) -> None:
    sources = [s.name for s in runtime.shelf.source_set(source_set)]
    for prompt in prompts():
        want = torch.cat([expected(source, prompt, folder) for source in sources], dim=1)
        want[0] = 0
        found = ask(
            runtime,
            "activation_all",
            prompt=prompt,
            source_set=source_set,
            selected_sources=[],
            sort_by_token_indexes=[],
            ignore_bos=True,
            num_results=30,
        )["activations"]
        assert close([row["max_value"] for row in found], want.amax(0).topk(30).values)
        width = want.shape[1] // len(sources)
        for row in found:
            assert close(row["values"], want[:, sources.index(row["source"]) * width + row["index"]])


@pytest.mark.parametrize("place", shortened(WRITABLE, "hook_resid_post", "attn.hook_z"))
def test_steered_tokens_of_the_real_model_equal_the_formula_by_hand(runtime: Runtime, place: str) -> None:
    """24 greedy tokens decoded with a cache, each one the argmax of a plain steered pass over all before it.

    The three methods and the control decode in one batch. Causal attention makes one uncached pass over the whole
    text show every step of an uncached loop at once; the loop itself is run on the small models.
    """
    layer, n_tokens = 15, 24
    prompt = runtime.tokenize("I think that", "once")
    hidden = models.read(plain_model(), "llama", prompt.ids, layer, place)
    vector = torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(1))
    size = float(hidden[1:].norm(dim=-1).mean())
    coefficients = {
        Do.ADD: 0.9 * size / float(vector.norm()),
        Do.ORTHOGONAL: -60.0,
        Do.CAP: -0.9 * size,
    }
    name = Point(layer, place).name
    plans = [Plan((Edit(m, Direction(name, tuple(vector.tolist())), c),)) for m, c in coefficients.items()]
    *steered, plain = asyncio.run(generate(runtime, prompt, [*plans, None], n_tokens))
    assert argmaxes(prompt.ids, plain) == plain
    for (method, c), tokens in zip(coefficients.items(), steered, strict=True):
        with models.hooked(plain_model(), "llama", layer, place, models.formula(method, vector, c)):
            assert argmaxes(prompt.ids, tokens) == tokens
        assert argmaxes(prompt.ids, tokens) != tokens  # without the vector the text would be another


def test_features_that_are_set_on_the_real_model_equal_saelens_by_hand(runtime: Runtime, folder: Path) -> None:
    """Each row clamps a feature of another SAE everywhere but at the first token; all decode in one batch."""
    prompt = runtime.tokenize("I think that", "once")
    clamps = {"15-res-4k": (1113, 90.0), "5-std": (3, 400.0), "6-jump": (4, 500.0), "8-gated": (5, 600.0)}
    plans = [Plan((Edit(Do.CLAMP, Feature(source, i), to),)) for source, (i, to) in clamps.items()]
    *steered, plain = asyncio.run(generate(runtime, prompt, [*plans, None], 16))
    for (source, (index, to)), tokens in zip(clamps.items(), steered, strict=True):
        sae = _sae(str(embedded.sae_dir(source) if source in embedded.SOURCES else folder / source))
        norm = _norms(sae)[index]

        def clamped(h: torch.Tensor, sae: Any = sae, norm: Any = norm, index: int = index, to: float = to) -> Any:
            activation = sae.encode(h)[..., index] * norm
            change = (to - activation)[..., None] * sae.W_dec[index] / norm
            return h + torch.cat([torch.zeros_like(change[:, :1]), change[:, 1:]], dim=1)

        with torch.no_grad(), models.hooked(plain_model(), "llama", int(source.split("-")[0]), RESID_POST, clamped):
            assert argmaxes(prompt.ids, tokens) == tokens, source
        assert argmaxes(prompt.ids, tokens) != tokens, source


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (Edit(Do.CLAMP, Feature("7-topk", 3), 1.0, field="edits.0"), "edits.0: Source '7-topk' is of the kind topk"),
        (Edit(Do.CLAMP, Feature("3", 3), 1.0, field="edits.0"), "edits.0: Source '3' is MLP neurons"),
        (
            Edit(Do.CLAMP, Feature("5-std", 3), 1.0, unit=Unit.OF_MAX, field="edits.0"),
            "edits.0: unit: no largest activation is known of feature 3 of '5-std'",
        ),
        (
            Edit(Do.ADD, Feature("5-std", 3), 1.0, when=Fires(Feature("7-topk", 1), 2.0), field="edits.4"),
            "edits.4: when: source '7-topk' is of the kind topk",
        ),
        (
            Edit(Do.ADD, Feature("5-std", 3), 1.0, when=Fires(Feature("6-jump", 1), 2.0), field="edits.4"),
            "edits.4: when: 'blocks.6.hook_resid_post' is reached after 'blocks.5.hook_resid_post'",
        ),
    ],
)
def test_what_cannot_be_set_is_refused(runtime: Runtime, edit: Edit, why: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asyncio.run(runtime.check_steering(Plan((edit,))))
    assert refused.value.message.startswith(why)
    asyncio.run(runtime.check_steering(Plan((Edit(Do.ADD, Feature("7-topk", 3), 1.0),))))


async def generate(runtime: Runtime, prompt: Tokens, plans: list[Plan | None], n: int) -> list[tuple[int, ...]]:
    rows = await anext(runtime.generate(prompt, plans, Sampling(n), stream=False))
    return [row.token_ids for row in rows]


def argmaxes(prompt: tuple[int, ...], generated: tuple[int, ...]) -> tuple[int, ...]:
    """The most probable token after each prefix; of those within rounding of it, the one that was generated."""
    with torch.no_grad():
        logits = plain_model()(torch.tensor([prompt + generated]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    taken = torch.tensor(generated)
    best = logits.max(-1)
    is_best = best.values - logits.gather(1, taken[:, None])[:, 0] <= CLOSE * logits.abs().amax(-1)
    return tuple(torch.where(is_best, taken, best.indices).tolist())
