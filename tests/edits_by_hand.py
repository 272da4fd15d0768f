"""Edits as their documentation states them, over plain Hugging Face: one text, no cache, no tables, SAELens's own SAEs.

What the library does with columns, groups as products and weights, is done here with whole encodings and decodings.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import Source
from neuronpedia_inference.edits.plan import Do, Feature, Fires, Not
from neuronpedia_inference.edits.rows import FeatureGauge, Gate, RowEdit, Trigger
from neuronpedia_inference.edits.select import EVERYTHING, Selection
from neuronpedia_inference.points import Point
from neuronpedia_inference.resolving.edits import gauge_of
from neuronpedia_inference.saes.encode import LoadedSae
from tests import models
from tests.models import NearTie

WIDTH = 32
N_FEATURES = 24
KINDS = ("standard", "jumprelu", "gated")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
READS = "mlp.hook_in"
"""Where transcoders read."""
NORMS = ("none", "constant_norm_rescale", "layer_norm")
Chosen = Callable[[int, int, int], float]
"""From a place in the text, the token there, and the number of prompt tokens, to how much is edited."""


@cache
def sae(kind: str, norm: str = "none", *, subtracts: bool = False, size: float = 1.0, width: int = WIDTH) -> Any:
    """Seeded, for vectors whose numbers are about `size`; its decoder norms are folded in by SAELens itself.

    subtracts: b_dec is taken off the input.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        from sae_lens.registry import get_sae_class
    make, configure = get_sae_class(kind)
    more: dict[str, Any] = {"d_out": width} if kind in TRANSCODERS else {}
    more["normalize_activations"] = norm
    config = configure(d_in=width, d_sae=N_FEATURES, apply_b_dec_to_input=subtracts, **more)
    built: Any = make(config)
    generator = torch.Generator().manual_seed(len(kind) + len(norm) + subtracts)
    of_input = 1.0 if norm != "none" else size
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if name.startswith("r_") else 0.3 if name.startswith("W_") else of_input
            parameter.copy_(noise.abs() * of_input if name == "threshold" else noise * scale)
    built.fold_W_dec_norm()
    return built.eval().requires_grad_(False)


@dataclass(frozen=True)
class When:
    """A condition, as a person would say it."""

    of: Any
    index: int
    layer: int
    place: str
    above: float
    n_tokens: int | None = 1
    negated: bool = False

    def fires(self, h: Tensor) -> list[bool]:
        """At every position of [pos, width] but the first, which is not looked at."""
        numbers = _encoded(self.of, h)[:, self.index]
        if float((numbers - self.above).abs().min()) <= 1e-5 * float(numbers.abs().max()):
            raise NearTie("a condition holds or not by rounding")
        return [False, *(numbers[1:] > self.above).tolist()]

    def holds(self, fired: Sequence[bool], behind: int) -> bool:
        """At the position before `behind`, or the newest of which something is known."""
        first = 0 if self.n_tokens is None else max(0, behind - self.n_tokens)
        return any(fired[first:behind]) != self.negated


@dataclass(frozen=True, eq=False)
class Hand:
    """One edit, as a person would say it. Two that say the same are two."""

    do: Do
    layer: int
    place: str
    amount: float = 0.0
    vector: Tensor | None = None
    of: Any = None
    """An SAE."""
    index: int = 0
    gives_to: Any = None
    """Of a swap: another index, or another vector."""
    is_dose: bool = False
    on: Selection = EVERYTHING
    chosen: Chosen = field(default=lambda place, token, n_prompt: 1.0)
    """The same as `on`, in plain words."""
    when: When | None = None
    most: float = math.inf
    """The largest dose."""

    def resolved(self) -> RowEdit:
        """For the library."""
        point = Point(self.layer, self.place)
        names = ("amount", "do", "is_dose", "on", "most")
        common: dict[str, Any] = {name: getattr(self, name) for name in names}
        common["when"] = None if self.when is None else _gate(self.when)
        if self.of is None:
            assert self.vector is not None
            return RowEdit(point, self.vector, other=self.gives_to, **common)
        vector, feature = _along(self, self.index)
        if self.do is Do.ADD:
            return RowEdit(point, vector, **common)
        other, other_feature = (None, None) if self.gives_to is None else _along(self, self.gives_to)
        return RowEdit(point, vector, feature=feature, other=other, other_feature=other_feature, **common)


def _along(hand: Hand, index: int) -> tuple[Tensor, FeatureGauge]:
    loaded = _loaded(hand.of, hand.layer, hand.place)
    elsewhere = Point(hand.layer, READS) if hand.of.cfg.architecture() in TRANSCODERS else None
    return loaded.decoder_row(index), FeatureGauge(
        (str(id(hand.of)), index), gauge_of(loaded.feature(index), torch.device("cpu")), elsewhere
    )


def _gate(when: When) -> Gate:
    fires = Fires(Feature("1-t", when.index), when.above, n_tokens=when.n_tokens)
    gauge = gauge_of(_loaded(when.of, when.layer, when.place).feature(when.index), torch.device("cpu"))
    on = Selection(but=(Selection(positions=(0,)),))
    trigger = Trigger(Point(when.layer, when.place), gauge, when.above, is_below=False, on=on)
    return Gate(Not(fires) if when.negated else fires, {fires: trigger})


def _loaded(of: Any, layer: int, place: str) -> LoadedSae:
    source = Source("1-t", "t", layer, Point(layer, place).name, N_FEATURES, of.cfg.d_in, of.cfg.architecture())
    return LoadedSae(source, of)


class Text:
    """A text that grows token by token; every pass runs all of it."""

    def __init__(
        self, family: str, hands: Sequence[Hand], prompt: Sequence[int], looked_at: Sequence[When] = ()
    ) -> None:
        self._family = family
        self._hands = hands
        self.tokens = list(prompt)
        self.n_prompt = len(prompt)
        whens = [*looked_at, *(hand.when for hand in hands if hand.when is not None)]
        self._fired: dict[When, list[bool]] = {when: [] for when in whens}
        """Of every condition, at every position of the pass under way, or of the one before."""
        self.passed: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        """[pos, width] at every point that is edited or looked at, before and behind its edits, in the last pass."""
        self.done: dict[Hand, Tensor] = {}
        """[pos, 5] of every edit in the last pass: how much it acts, what it finds, what is to become of it, what is
        there in the end, and the norm of what it has written by that of what was there."""
        self._inputs: dict[int, Tensor] = {}
        """[pos, width]: what every block's MLP reads, in the pass under way."""

    def holds(self, when: When) -> bool:
        """At the last token that has been the input."""
        return when.holds(self._fired[when], len(self._fired[when]))

    def grow(self, banned: Sequence[int] = ()) -> None:
        """One token more, none of these. Raises NearTie where rounding could decide it, or whether a feature fires."""
        net = models.model(self._family)
        points = {(hand.layer, hand.place) for hand in self._hands} | {(one.layer, one.place) for one in self._fired}
        with ExitStack() as stack:
            for number, block in enumerate(models.blocks(net)):
                mlp: Any = block.mlp
                stack.callback(models._hook(mlp, True, partial(self._keep_input, number)).remove)
            for layer, place in sorted(points, key=lambda point: point[1] == "hook_resid_mid"):
                stack.enter_context(models.hooked(net, self._family, layer, place, partial(self._pass, layer, place)))
            self.tokens += models.greedy(net, self.tokens, 1, banned)

    def _keep_input(self, layer: int, h: Tensor) -> Tensor:
        self._inputs[layer] = h[0]
        return h

    def _pass(self, layer: int, place: str, h: Tensor) -> Tensor:
        found = h.flatten(2)[0]
        for when in self._fired:
            if (when.layer, when.place) == (layer, place):
                self._fired[when] = when.fires(found)
        here = [hand for hand in self._hands if (hand.layer, hand.place) == (layer, place)]
        behind = edited(found, here, self, layer)
        self.passed[layer, place] = found, behind
        return behind.view_as(h)

    def share(self, hand: Hand, at: int) -> float:
        """How much a position is edited."""
        share = hand.chosen(at, self.tokens[at], self.n_prompt)
        when = hand.when
        if when is None:
            return share
        is_late = (when.layer, IN_A_BLOCK.index(when.place)) > (hand.layer, IN_A_BLOCK.index(hand.place))
        if is_late and at < self.n_prompt:
            return 0.0
        return share * when.holds(self._fired[when], at if is_late else at + 1)

    def reads(self, of: Any, layer: int, h: Tensor) -> Tensor:
        """What an SAE encodes: the tensor that it edits, or of a transcoder the MLP's input."""
        return self._inputs[layer] if of.cfg.architecture() in TRANSCODERS else h


IN_A_BLOCK = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


def greedy(family: str, hands: Sequence[Hand], prompt: Sequence[int], n_tokens: int) -> list[int]:
    """What a plain loop takes; raises NearTie where rounding could decide a token, or whether a feature fires."""
    text = Text(family, hands, prompt)
    for _ in range(n_tokens):
        text.grow()
    return text.tokens[len(prompt) :]


@dataclass(frozen=True)
class HandRule:
    """What is done at a token at which a condition holds."""

    when: When
    back: int = 0
    """Tokens that are taken back, unless so many have followed them; 0: the text ends with this one."""
    times: int = 0


Ruling = tuple[list[int], str, list[tuple[int, int, int]]]
"""Tokens, why the text ended, and of every refusal the rule, how many tokens were left, and how many were not."""


def ruled(text: Text, n_tokens: int, rules: Sequence[HandRule]) -> Ruling:
    """What a plain loop takes under rules. The text's last pass is that of all its tokens."""
    found = _ruled(text, n_tokens, rules)
    text.tokens = [*text.tokens[: text.n_prompt], *found[0]]
    text.grow()
    text.tokens.pop()
    return found


def _ruled(text: Text, n_tokens: int, rules: Sequence[HandRule]) -> Ruling:
    refusals: list[tuple[int, int, int]] = []
    banned: dict[int, list[int]] = {}
    n_told, n_held = 0, max((rule.back or 1 for rule in rules), default=0)
    while True:
        n_seen = len(text.tokens) - text.n_prompt
        text.grow(banned.get(n_seen, ()))
        acting = [n for n, rule in enumerate(rules) if n_seen and text.holds(rule.when)]
        if not acting and n_seen < n_tokens:
            n_told = max(n_told, n_seen + 1 - n_held)
            continue
        text.tokens.pop()  # it only had to be looked at
        kept = text.tokens[text.n_prompt :]
        if not acting or not rules[acting[0]].back:
            return kept, "stop_rule" if acting else "length", refusals
        rule = rules[acting[0]]
        n_refused = min(rule.back, n_seen - n_told)
        n_left = n_seen - n_refused
        refusals.append((acting[0], n_left, n_refused))
        banned = {place: ids for place, ids in banned.items() if place <= n_left}
        banned.setdefault(n_left, []).append(kept[n_left])
        del text.tokens[text.n_prompt + n_left :]
        if sum(number == acting[0] for number, *_ in refusals) > rule.times:
            return kept[:n_left], "retry_exhausted", refusals


def edited(h: Tensor, hands: Sequence[Hand], text: Text, layer: int) -> Tensor:
    """[pos, width] -> [pos, width]"""
    norm = h.pow(2).sum(-1).sqrt()
    for sets_features, same in groupby(hands, lambda hand: hand.of is not None and hand.do is not Do.ADD):
        run = list(same)
        if sets_features:
            of_each = {id(hand.of): hand.of for hand in run}.values()
            h = h + sum(_features_set(text.reads(of, layer, h), of, run, norm, text) for of in of_each)
        for hand in [] if sets_features else run:
            h = _along_direction(h, hand, norm, text)
    for hand in (hand for hand in hands if hand.do is not Do.ADD):
        read = text.reads(hand.of, layer, h) if hand.of is not None else h
        text.done[hand][:, 3] = hand.of.encode(read)[:, hand.index] if hand.of is not None else h @ _unit(hand.vector)
    return h


def _features_set(x: Tensor, of: Any, run: Sequence[Hand], norm: Tensor, text: Text) -> Tensor:
    """The change where features of one SAE are encoded from x, set and decoded."""
    numbers = _encoded(of, x)
    before = numbers.clone()
    for hand in (hand for hand in run if hand.of is of):
        then, shares, targets = numbers.clone(), [], []
        for pos in range(len(x)):
            share = text.share(hand, pos)
            amount = hand.amount * float(norm[pos]) if hand.is_dose else hand.amount
            now = float(numbers[pos, hand.index])
            target = _new(hand.do, now, amount, hand.amount)
            then[pos, hand.index] += share * (target - now)
            if hand.do is Do.SWAP:
                then[pos, hand.gives_to] += share * now
            shares.append(share)
            targets.append(target)
        dose = (_decoded(of, then, x) - _decoded(of, numbers, x)).norm(dim=-1) / norm
        less = (hand.most / dose.clamp(min=1e-30)).clamp(max=1)
        numbers = numbers + less[:, None] * (then - numbers)
        found = (torch.tensor(shares), before[:, hand.index], torch.tensor(targets))
        text.done[hand] = torch.stack([*found, torch.zeros(len(x)), dose * less], 1)
    return _decoded(of, numbers, x) - _decoded(of, before, x)


def _encoded(of: Any, x: Tensor) -> Tensor:
    found = of.encode(x)
    for nearly in (x * (1 + 1e-5), x * (1 - 1e-5)):
        if bool(((of.encode(nearly) > 0) != (found > 0)).any()):
            raise NearTie("a feature fires or not by rounding")
    return found


def _decoded(of: Any, numbers: Tensor, x: Tensor) -> Tensor:
    of.encode(x)  # SAELens keeps what it normalised by until it decodes
    return of.decode(numbers)


def _along_direction(h: Tensor, hand: Hand, norm: Tensor, text: Text) -> Tensor:
    vector = hand.of.W_dec[hand.index] if hand.vector is None else hand.vector
    unit = _unit(vector)
    rows, done = [], []
    for pos, row in enumerate(h):
        amount = hand.amount * float(norm[pos]) if hand.is_dose else hand.amount
        size = target = 0.0
        if hand.do is Do.ADD:
            change = amount * (unit if hand.is_dose else vector)
        else:
            size = float(row @ unit)
            target = _new(hand.do, size, amount, hand.amount)
            change = (target - size) * unit
            if hand.do is Do.SWAP:
                change = change + size * _unit(hand.gives_to)
        share = text.share(hand, pos)
        dose = share * float(change.norm() / norm[pos])
        rows.append(row + min(1.0, hand.most / max(dose, 1e-30)) * share * change)
        done.append((share, size, target, 0.0, min(dose, hand.most)))
    text.done[hand] = torch.tensor(done)
    return torch.stack(rows)


def _unit(vector: Any) -> Tensor:
    return vector / vector.pow(2).sum().sqrt()


def _new(do: Do, number: float, amount: float, factor: float) -> float:
    match do:
        case Do.CLAMP:
            return amount
        case Do.SCALE | Do.ORTHOGONAL:
            return factor * number
        case Do.AT_LEAST | Do.FLOOR:
            return max(number, amount)
        case Do.AT_MOST | Do.CAP:
            return min(number, amount)
        case Do.SWAP | Do.PROJECT_OUT:
            return 0.0
    raise AssertionError(do)
