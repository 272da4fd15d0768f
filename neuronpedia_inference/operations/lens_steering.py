"""What a lens request changes at blocks' outputs, as edits of directions (contract 4.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronpedia_inference.domain import Lens, Numbers, Tokens
from neuronpedia_inference.edits.plan import Direction, Do, Edit, Plan, Unit
from neuronpedia_inference.edits.select import Phase, Selection
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.edits import plan_of
from neuronpedia_inference.points import RESID_POST, Point
from neuronpedia_inference.schemas.lens import LensPromptRequest, LensSteerToken

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

FIELD = "steer_tokens"


async def steering_plan(request: LensPromptRequest, prompt: Tokens, rt: Runtime) -> Plan | None:
    """The edits of `steering`, and then those of tokens' directions; None where nothing is changed.

    Raises InvalidRequest for tokens or blocks that there are not, NoJacobianLens, and what `plan_of` raises.
    """
    skips = request.chat is not None and not request.input_token_ids
    along = await _edits_of_tokens(request, prompt, rt)
    if request.steering is None:
        return Plan(along) if along else None
    try:
        plan = plan_of(request.steering, rt, behind=along, skip_special_tokens=skips)
    except InvalidRequest as exc:
        raise type(exc)(f"steering: {exc.message}") from exc
    if plan is None:
        return None
    own = plan.edits[: len(plan.edits) - len(along)]
    return replace(plan, edits=(*(replace(edit, field=f"steering.{edit.field}") for edit in own), *along))


async def _edits_of_tokens(request: LensPromptRequest, prompt: Tokens, rt: Runtime) -> tuple[Edit, ...]:
    """One per block. A swap comes before ablation, and that before addition."""
    has_tokens = bool(request.steer_tokens)
    is_active = request.swap_token is not None or (has_tokens and (request.steer_ablate or request.steer_strength != 0))
    if not request.steer_layers or not is_active:
        return ()
    if not has_tokens:
        raise InvalidRequest("swap_token: name in steer_tokens what it takes the place of")
    layers = _layers(request.steer_layers, rt.model.n_layers)
    along = await _directions(request.steer_tokens, FIELD, layers, rt)
    to = None if request.swap_token is None else await _directions([request.swap_token], "swap_token", layers, rt)
    how: dict[str, Any] = {"on": _where(request, prompt), "field": FIELD}
    return tuple(_edit(request, layer, along, to, how) for layer in layers)


def _edit(
    request: LensPromptRequest,
    layer: int,
    along: dict[int, Numbers],
    to: dict[int, Numbers] | None,
    how: dict[str, Any],
) -> Edit:
    direction = _direction(layer, along)
    if to is not None:
        return Edit(Do.SWAP, direction, other=_direction(layer, to), **how)
    if request.steer_ablate:
        return Edit(Do.PROJECT_OUT, direction, **how)
    # strength · |h| · δ, of the length |h| at the most: a dose of δ/|δ|.
    amount = float(np.clip(request.steer_strength * np.linalg.norm(along[layer]), -1.0, 1.0))
    return Edit(Do.ADD, direction, amount, Unit.DOSE, **how)


def _direction(layer: int, found: dict[int, Numbers]) -> Direction:
    return Direction(Point(layer, RESID_POST).name, found[layer].tolist())


def _where(request: LensPromptRequest, prompt: Tokens) -> Selection:
    """The prompt, and what follows if that is asked for; not its BOS."""
    phase = Phase.BOTH if request.steer_generated_tokens else Phase.PROMPT
    return Selection(phase, but=(Selection(positions=(0,)),) if prompt.has_bos else ())


def _layers(asked: Sequence[int], n_layers: int) -> list[int]:
    for layer in asked:
        if not 0 <= layer < n_layers:
            raise InvalidRequest(f"steer_layers: {layer} is none of this model's, which are 0 to {n_layers - 1}.")
    return sorted(set(asked))


async def _directions(
    tokens: Sequence[LensSteerToken], field: str, layers: Sequence[int], rt: Runtime
) -> dict[int, Numbers]:
    words = await rt.lenses.read_words()
    found: list[tuple[int, Lens]] = []
    for one in tokens:
        token_id = words.find(one.token)
        if token_id is None:
            raise InvalidRequest(f"{field}: {one.token[:80]!r} is no token of this model. Name one that it has.")
        if one.type == Lens.JACOBIAN:
            rt.lenses.check_jacobians()
        found.append((token_id, Lens(one.type)))
    return await rt.directions(found, layers)
