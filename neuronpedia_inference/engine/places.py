"""What the places of a loaded model hold: read in one pass, held against what they mean, steered and looked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.edits.rows import RowEdit
from neuronpedia_inference.engine.agreement import agree, error, overflow
from neuronpedia_inference.engine.faults import trial_failure
from neuronpedia_inference.engine.hooks import Edit, edits
from neuronpedia_inference.engine.protocol import RowSpec
from neuronpedia_inference.engine.steered import steering_edits
from neuronpedia_inference.engine.tree import CANDIDATES, IN, ModuleSide, Tree, rms_normalized
from neuronpedia_inference.engine.verdict import Finding
from neuronpedia_inference.points import (
    ATTN_OUT,
    HOOK_Z,
    INSIDE_ATTENTION,
    MLP_OUT,
    MLP_POST,
    MLP_PRE,
    MLP_PRE_LINEAR,
    NORMALIZED,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    WRITABLE,
    Point,
)

N_MEASURED = (4, 8)
"""Prompts, and tokens of each, over which typical norms are taken."""
ABSENT = "this block has no such tensor"
_LN = {"ln1.hook_normalized": ("ln1.hook_in", "ln1.hook_out"), "ln2.hook_normalized": ("ln2.hook_in", "ln2.hook_out")}
_GIVES = {HOOK_Z: ATTN_OUT, MLP_POST: MLP_OUT}
"""Places that are the input of an output projection, and what that gives."""
_OFFERED = [place for place in CANDIDATES if not place.startswith("ln") and place != "attn.o.hook_out"]


@dataclass
class _Layer:
    """What was seen in one block: at every candidate of every place, [1, pos, width] or None."""

    candidates: Mapping[str, Sequence[Tensor | None]]
    after: Tensor | None
    """What the next block, or the last norm, reads."""
    which: dict[str, int] = field(default_factory=dict)
    """The candidate that a place is."""
    adds_up: bool = False
    """Whether the block adds its attention and its MLP to its input, and nothing else happens."""

    def at(self, place: str) -> Tensor | None:
        """What was seen there; None of a place that the block has not."""
        return self.candidates[place][self.which[place]] if place in self.which else None


def findings(tree: Tree, ids: Sequence[int], rms_eps: float) -> tuple[dict[Point, Finding], int]:
    """All points, and the number of heads of attention's values. Runs a few passes over `ids`; adopts what it finds.

    rms_eps: epsilon of the model's RMS norms, 0 for other norms.
    """
    prompt = torch.tensor([list(ids)])
    with _collected(tree) as layers_of:
        plain = tree.run(prompt, use_cache=False).logits
    layers = layers_of()
    for layer in layers:
        _identify(layer)
    found = {
        Point(number, place): finding
        for number, layer in enumerate(layers)
        for place, finding in (*_readable(layer), *_normalized(layer, rms_eps))
    }
    attention, n_value_heads = _attention(tree, prompt, layers)
    found |= attention
    adopt(tree, found)
    for place in WRITABLE:
        found |= _written(tree, prompt, layers, place, found, plain)
    return _measured(tree, layers, found), n_value_heads


def adopt(tree: Tree, found: Mapping[Point, Finding]) -> None:
    """The tree's points are what was found."""
    tree.adopt({point: one.which for point, one in found.items() if one.width and point.place in CANDIDATES})


@contextmanager
def _collected(tree: Tree) -> Iterator[Callable[[], list[_Layer]]]:
    """What passes by at every candidate, before any edit that is attached later."""
    seen: dict[ModuleSide, Tensor] = {}

    def keeper(side: ModuleSide) -> Edit:
        def keep(tensor: Tensor) -> None:
            seen[side] = tensor.flatten(2).clone()

        return keep

    def layers() -> list[_Layer]:
        befores = [seen.get(ModuleSide(block, IN)) for block in tree.blocks[1:]]
        last = None if final is None else seen.get(final)
        return [
            _Layer({place: [side and seen.get(side) for side in of[number]] for place, of in by_layer.items()}, after)
            for number, after in enumerate([*befores, last])
        ]

    by_layer = {place: [tree.candidates(Point(n, place)) for n in range(tree.n_layers)] for place in CANDIDATES}
    final = None if tree.final_norm is None else ModuleSide(tree.final_norm, IN)
    sides = {side for of in by_layer.values() for layer in of for side in layer if side is not None}
    with ExitStack() as stack:
        for side in (*sides, *([final] if final else [])):
            stack.callback(tree.hook(side, keeper(side)))
        yield layers


def _identify(layer: _Layer) -> None:
    """Which candidate every place is: the first that anything passes, but for those whose meaning decides."""
    for place, seen in layer.candidates.items():
        fired = [which for which, tensor in enumerate(seen) if tensor is not None]
        if fired and place not in (ATTN_OUT, RESID_MID, MLP_OUT):
            layer.which[place] = fired[0]
    pre, post = layer.at(RESID_PRE), layer.at(RESID_POST)
    if pre is None or post is None:
        return
    pairs = list(product(_like(layer, ATTN_OUT, pre), _like(layer, MLP_OUT, pre)))
    sums = {(a, m): attn + mlp for (a, attn), (m, mlp) in pairs}
    best = min(sums, key=lambda pair: error(sums[pair], post - pre), default=None)
    if best is not None and agree(sums[best], post - pre, pre, post):
        layer.adds_up = True
        layer.which |= {ATTN_OUT: best[0], MLP_OUT: best[1]}
    for (mid, read), (a, attn) in product(_like(layer, RESID_MID, pre), _like(layer, ATTN_OUT, pre)):
        if a == layer.which.get(ATTN_OUT, a) and agree(read - pre, attn, pre, read):
            layer.which |= {RESID_MID: mid, ATTN_OUT: a}
            return


def _like(layer: _Layer, place: str, resid: Tensor) -> list[tuple[int, Tensor]]:
    """The candidates that could be added to the residual stream."""
    seen = enumerate(layer.candidates[place])
    return [(which, tensor) for which, tensor in seen if tensor is not None and tensor.shape == resid.shape]


def _readable(layer: _Layer) -> Iterator[tuple[str, Finding]]:
    for place in _OFFERED:
        seen, because = layer.at(place), _why_unread(layer, place)
        width = 0 if seen is None else seen.shape[-1]
        yield place, Finding(width, layer.which.get(place, 0), because, because if place in WRITABLE else "")


def _why_unread(layer: _Layer, place: str) -> str:
    """Empty if what was seen there is what the place means."""
    seen, post, hidden = layer.at(place), layer.at(RESID_POST), layer.at(MLP_POST)
    because = "" if seen is None else overflow(seen.dtype, seen)
    if because:
        return because
    if place in (ATTN_OUT, MLP_OUT) and not layer.adds_up:
        return "this block's output is not the sum of its input, its attention's output and its MLP's"
    if place == RESID_MID and seen is None:
        return "nothing in this block reads the sum of its input and its attention's output"
    if place == RESID_POST and post is not None and layer.after is not None and not agree(post, layer.after):
        return "what follows this block does not read its output"
    if seen is not None and place in _GIVES and not _gives(layer, _GIVES[place]):
        return "the module that should read it does not give what this block's attention or MLP does"
    if seen is None or (place in (MLP_PRE, MLP_PRE_LINEAR) and (hidden is None or seen.shape != hidden.shape)):
        return ABSENT
    return "this block's MLP has no gate" if place == MLP_PRE_LINEAR and layer.which[MLP_PRE] != 0 else ""


def _gives(layer: _Layer, contribution: str) -> bool:
    """Whether the output projection's output is its module's (the candidate before it), or what the block adds."""
    parts = [part for part, _ in CANDIDATES[contribution]]
    last = next(which for which, part in enumerate(parts) if "." in part)
    projected, whole = layer.candidates[contribution][last], layer.candidates[contribution][last - 1]
    is_whole = projected is not None and whole is not None and agree(projected, whole)
    return is_whole or layer.which.get(contribution) == last


def _normalized(layer: _Layer, rms_eps: float) -> Iterator[tuple[str, Finding]]:
    """The norm must read the residual stream, and give what is computed times a gain of its own."""
    for place, source in NORMALIZED.items():
        resid, inside, outside = layer.at(source), *(layer.at(name) for name in _LN[place])
        because = ""
        if resid is None or inside is None or outside is None or not rms_eps:
            because = "this block has no RMS norm of that residual stream"
        else:
            normal = rms_normalized(resid, rms_eps)
            largest = normal[0].abs().argmax(0)
            gain = (outside[0].float() / normal[0]).gather(0, largest[None])
            if not agree(inside, resid) or not agree(outside, (normal * gain).to(outside.dtype)):
                because = "this block has no RMS norm of that residual stream"
        yield place, Finding(0 if because or resid is None else resid.shape[-1], 0, because)


def _attention(tree: Tree, prompt: Tensor, layers: Sequence[_Layer]) -> tuple[dict[Point, Finding], int]:
    """Pattern and values, offered where the values weighted by the pattern are what the heads give."""
    seen: dict[Point, Tensor] = {}
    points = [Point(number, place) for number in range(tree.n_layers) for place in INSIDE_ATTENTION]

    def run() -> None:
        with edits(
            tree, [(point, lambda tensor, point=point: seen.update({point: tensor.clone()})) for point in points]
        ):
            tree.run(prompt, use_cache=False)

    failure = trial_failure("reading attention", run)
    found: dict[Point, Finding] = {}
    n_value_heads = 0
    for number, layer in enumerate(layers):
        pattern, values = (seen.get(Point(number, place)) for place in INSIDE_ATTENTION)
        because = "" if failure is None else "attention could not be read in this model"
        if not because and (pattern is None or values is None):
            because = "this architecture's attention is not read"
        z = layer.at(HOOK_Z)
        if pattern is not None and values is not None and (z is None or not _are_heads(z, pattern, values)):
            because = "what these heads give is not their values weighted by their pattern"
        for place in INSIDE_ATTENTION:
            width = 0 if because or values is None else values.flatten(2).shape[-1]
            found[Point(number, place)] = Finding(width, 0, because)
        if not because and values is not None:
            n_value_heads = values.shape[2]
    return found, n_value_heads


def _are_heads(z: Tensor, pattern: Tensor, values: Tensor) -> bool:
    """z: [1, pos, width]; pattern: [1, head, query, key]; values: [1, key, key-value head, d_head]"""
    each = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
    weighted = torch.einsum("bhqk,bkhd->bqhd", pattern.float(), each.float()).flatten(2)
    return agree(weighted.to(z.dtype), z, values.flatten(2))


def _written(
    tree: Tree, prompt: Tensor, layers: Sequence[_Layer], place: str, found: Mapping[Point, Finding], plain: Tensor
) -> dict[Point, Finding]:
    """Steer at a place in all layers that have it, in one pass, and look for the change where it must arrive."""
    points = [Point(n, place) for n in range(tree.n_layers) if not found[Point(n, place)].unread_because]
    vectors = {point: _vector(layers[point.layer], point) for point in points}
    edits_of = tuple(RowEdit(point, vectors[point], 1.0, Do.ADD) for point in points)
    row = RowSpec(tuple(prompt[0].tolist()), Sampling(1), edits_of)
    steered = [plain]
    with _collected(tree) as seen_by, edits(tree, steering_edits([row])):
        failure = trial_failure(f"steering {place}", lambda: steered.append(tree.run(prompt, use_cache=False).logits))
    changes_nothing = failure is not None or torch.equal(steered[-1], plain)
    lost = overflow(plain.dtype, steered[-1]) or "what is added there does not arrive as it should"
    seen = [replace(now, which=was.which, adds_up=was.adds_up) for now, was in zip(seen_by(), layers, strict=True)]
    because = {
        point: "" if not changes_nothing and _arrived(tree, point, seen[point.layer], vectors[point]) else lost
        for point in points
    }
    return {point: replace(found[point], unwritten_because=because[point]) for point in points}


def _measured(tree: Tree, layers: Sequence[_Layer], found: Mapping[Point, Finding]) -> dict[Point, Finding]:
    """With the norms of what is where the model can be steered. Position 0 is left out, which is far larger than
    others, and so are the first ids, among which special tokens are."""
    embedding: Any = tree.model.get_input_embeddings()
    n_vocab = len(embedding.weight)
    first, n_ids = n_vocab // 20, N_MEASURED[0] * N_MEASURED[1]
    ids = [first + n * (n_vocab - first) // n_ids for n in range(n_ids)]
    with _collected(tree) as seen_by:
        tree.run(torch.tensor(ids).view(N_MEASURED), use_cache=False)
    seen = [replace(now, which=was.which) for now, was in zip(seen_by(), layers, strict=True)]
    measured = dict(found)
    for point in (point for point, one in found.items() if point.place in WRITABLE and not one.unread_because):
        there = seen[point.layer].at(point.place)
        norm = 0.0 if there is None else float(there.float()[:, 1:].norm(dim=-1).median())
        measured[point] = replace(found[point], norm=norm if math.isfinite(norm) else 0.0)
    return measured


def _vector(layer: _Layer, point: Point) -> Tensor:
    """[width], seeded, about as long as what is there."""
    there = layer.at(point.place)
    assert there is not None, point
    generator = torch.Generator().manual_seed(point.layer)
    direction = torch.randn(there.shape[-1], generator=generator).to(there.device)
    return direction * there.float().norm(dim=-1).median() / direction.norm()


def _arrived(tree: Tree, point: Point, layer: _Layer, vector: Tensor) -> bool:
    """Whether a vector that was added at a point is found further down. `layer`: what was seen before it was added."""
    at = layer.at
    if point.place == HOOK_Z:
        z, out, module = at(HOOK_Z), at("attn.o.hook_out"), tree.part(point.layer, "attn.o")
        return z is not None and out is not None and module is not None and agree(out, module(z + vector.to(z.dtype)))
    parts: Mapping[str, Sequence[Tensor | None]] = {
        RESID_PRE: (at(RESID_POST), at(RESID_PRE), at(ATTN_OUT), at(MLP_OUT))
        if layer.adds_up
        else (at("ln1.hook_in"), at(RESID_PRE)),
        ATTN_OUT: (at(RESID_POST), at(RESID_PRE), at(ATTN_OUT), at(MLP_OUT)),
        RESID_MID: (at(RESID_MID), at(RESID_PRE), at(ATTN_OUT)),
        MLP_OUT: (at(RESID_POST), at(RESID_PRE), at(ATTN_OUT), at(MLP_OUT)),
        RESID_POST: (layer.after, at(RESID_POST)),
    }
    whole, *others = (part for part in parts[point.place] if part is not None)
    change = whole - torch.stack(others).sum(0)
    return agree(change, vector.expand_as(change), whole, *others)
