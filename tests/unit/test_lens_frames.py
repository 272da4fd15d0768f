"""Frames of a lens are made one by one, however many tokens become known at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from neuronpedia_inference.domain import Lens, Tokens, Written
from neuronpedia_inference.operations.characters import Shown
from neuronpedia_inference.operations.lens_frames import Asked, Frames, Prompt
from neuronpedia_inference.schemas.lens import LensDone, LensFrame, LensPromptRequest

N_TOKENS, N_LAYERS, TOP_N = 40, 3, 5


async def at_once() -> AsyncIterator[tuple[Written, ...]]:
    """The numbers of a whole prompt in one step."""
    names = np.tile(np.arange(TOP_N), (N_TOKENS, N_LAYERS, 1))
    both = np.stack([names, np.full(names.shape, -1.0)], axis=2)
    yield (Written(finish_reason="length", numbers=both.reshape(N_TOKENS, -1)),)


def test_a_frame_is_made_when_it_is_asked_for() -> None:
    named: list[int] = []

    def name(token_id: int) -> str:
        named.append(token_id)
        return f"t{token_id}"

    tokens = Tokens((1,) * N_TOKENS, ("x",) * N_TOKENS, (False,) * N_TOKENS, has_bos=False)
    request = LensPromptRequest(model="m", type=["LOGIT_LENS"], prompt="x", top_n=TOP_N)
    place = SimpleNamespace(behind=range(2 * N_LAYERS * TOP_N))
    plan: Any = SimpleNamespace(read_from=0, places=lambda _: [place])
    asked = Asked(request, Prompt(tokens, [Shown("x", False)] * N_TOKENS), {Lens.LOGIT: [0, 1, 2]}, plan, 0)
    runtime: Any = SimpleNamespace(token_string=name, decode=lambda ids: "", model=SimpleNamespace(vocab_size=9))

    async def told() -> list[Any]:
        frames = Frames(at_once(), asked, cast("Any", runtime))
        kinds: list[Any] = [await anext(frames), await anext(frames)]
        for number in range(1, N_TOKENS + 1):
            kinds.append(await anext(frames))
            assert len(named) == number * N_LAYERS * TOP_N
        return [*kinds, *[frame async for frame in frames]]

    frames = asyncio.run(told())
    assert [type(frame) for frame in frames[2:]] == [LensFrame] * N_TOKENS + [LensDone]
    assert frames[2].results[0].top_tokens == [["t0", "t1", "t2", "t3", "t4"]] * N_LAYERS
