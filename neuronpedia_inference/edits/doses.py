"""How large the dose of an edit may become, from what is known before anything runs. Arithmetic on plain numbers.

The dose is the norm of what an edit writes by the norm N of what is there. With c the amount by N (of a dose: the dose
itself), d the vector that is written, A the largest known activation of the feature by N, |d| = 1 of decoder rows, and
a direction's h·v̂ between −N and N, it is at most

    add           |c|·|d|          (of a dose |c|: directions have unit length)
    orthogonal    |c − 1|          with c the factor itself; project_out 1; swap of directions |t̂ − ŝ|
    cap, floor    max(0, 1 − c), max(0, 1 + c)
    clamp         max(|c|, |c − A|)
    scale         |c − 1|·A        with c the factor itself
    at_least      max(0, c);  at_most max(0, A − c)
    swap          2·A              decoder rows are at most 2 apart
"""

from __future__ import annotations

from neuronpedia_inference.edits.plan import Do

_FACTORS = (Do.ORTHOGONAL, Do.SCALE)
"""Whose amounts are no numbers of what is there."""


def needs_norm(do: Do, *, is_dose: bool, of_feature: bool) -> bool:
    """Whether the bound depends on the norm of what is there."""
    if of_feature and do is not Do.ADD:
        return True
    return not is_dose and do in (Do.ADD, Do.CAP, Do.FLOOR)


def needs_maximum(do: Do) -> bool:
    """Of an edit of a feature: whether the bound depends on its largest activation."""
    return do in (Do.CLAMP, Do.SCALE, Do.AT_MOST, Do.SWAP)


def largest_dose(
    do: Do, amount: float, *, is_dose: bool, of_feature: bool, length: float = 1.0, norm: float = 1.0, most: float = 0.0
) -> float:
    """length: |d| of `add` in absolute units, |t̂ − ŝ| of a swap of directions. norm: N. most: A·N."""
    c = amount if is_dose or do in _FACTORS else amount / norm
    a = most / norm
    if do is Do.ADD:
        return abs(c) * (1.0 if is_dose else length)
    if of_feature:
        bounds = {
            Do.CLAMP: max(abs(c), abs(c - a)),
            Do.SCALE: abs(c - 1) * a,
            Do.AT_LEAST: max(0.0, c),
            Do.AT_MOST: max(0.0, a - c),
            Do.SWAP: 2 * a,
        }
        return bounds[do]
    bounds = {
        Do.ORTHOGONAL: abs(c - 1),
        Do.PROJECT_OUT: 1.0,
        Do.SWAP: length,
        Do.CAP: max(0.0, 1 - c),
        Do.FLOOR: max(0.0, 1 + c),
    }
    return bounds[do]
