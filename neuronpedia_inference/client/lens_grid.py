"""What a lens reads: what the model would say behind each of its blocks, at every token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.client import html
from neuronpedia_inference.client.results import Cells, Result, terminal

if TYPE_CHECKING:
    import numpy as np
    from rich.console import RenderableType

Ranked = tuple[tuple[str, ...], tuple[float, ...]]
"""Tokens, the likeliest first, and their probabilities."""
DRAWN = 32
"""Tokens drawn of a long text, the last ones; all of them are in the value."""


@dataclass(frozen=True)
class LensReading:
    """What one lens reads at one token."""

    type: str
    """`LOGIT_LENS` or `JACOBIAN_LENS`."""
    top_tokens: tuple[tuple[str, ...], ...]
    """[block][rank]: the likeliest next tokens."""
    top_probs: tuple[tuple[float, ...], ...]
    """[block][rank]: their probabilities among all tokens, with 4 decimals."""


@dataclass(frozen=True)
class LensToken:
    """A token of prompt or completion."""

    token: str
    id: int
    position: int
    is_generated: bool
    results: tuple[LensReading, ...]
    """One for each lens."""
    role: str | None = None
    """Who speaks there, in a chat."""


@dataclass(frozen=True, repr=False)
class LensGrid(Result):
    """The likeliest next tokens behind each block, at every token of a text."""

    layers: dict[str, tuple[int, ...]]
    """By lens, the blocks behind which it reads, ascending."""
    tokens: tuple[LensToken, ...]
    completion: str = ""
    """What was generated."""
    has_bos: bool = False
    """Whether the first token is one that nobody wrote; it is not drawn."""

    @classmethod
    def of(cls, answer: Mapping[str, Any], prompt: str | None) -> LensGrid:
        """As the service answers it; prompt: None of a chat. Raises ValueError for another shape."""
        meta, tokens = answer["meta"], answer["tokens"]
        first = tokens[0] if tokens and tokens[0]["position"] == 0 and meta["prepend_bos"] else None
        has_bos = first is not None and prompt is not None and not prompt.startswith(first["token"])
        told = {"layers": meta["layers_by_type"], "tokens": tokens, "completion": answer["done"]["completion"]}
        return cls.read(told, has_bos=has_bos)

    def __repr__(self) -> str:
        lenses = ", ".join(f"{name} behind {len(layers)} blocks" for name, layers in self.layers.items())
        return f"LensGrid({len(self.tokens)} tokens, {lenses})"

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[LensToken]:
        return iter(self.tokens)

    def __getitem__(self, place: int) -> LensToken:
        return self.tokens[place]

    def numpy(self, lens: str | None = None) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[token, block, rank]: probabilities. lens: which, where there are several. Raises ValueError for another."""
        import numpy

        place = self._place(lens)
        return numpy.array([one.results[place].top_probs for one in self.tokens], float)

    def _place(self, lens: str | None) -> int:
        names = list(self.layers)
        if lens is None and len(names) == 1:
            return 0
        if lens not in names:
            raise ValueError(f"lens: name one of {', '.join(names)}, not {lens!r}")
        return names.index(lens)

    def cells(self) -> Cells:
        return [
            {
                "lens": name,
                "position": one.position,
                "token": one.token,
                "block": layer,
                "rank": rank,
                "next": token,
                "probability": probability,
            }
            for place, (name, layers) in enumerate(self.layers.items())
            for one in self.tokens
            for layer, tokens, probs in zip(
                layers, one.results[place].top_tokens, one.results[place].top_probs, strict=True
            )
            for rank, (token, probability) in enumerate(zip(tokens, probs, strict=True), start=1)
        ]

    def _note(self) -> str:
        hidden = f", the last {DRAWN} of {len(self.tokens)} tokens" if len(self._drawn()) == DRAWN else ""
        return f"the likeliest next token behind each block, by its probability{hidden}"

    def _drawn(self) -> Sequence[LensToken]:
        return self.tokens[int(self.has_bos) :][-DRAWN:]

    def __rich__(self) -> RenderableType:
        draw, parts = terminal(), []
        head = [one.token for one in self._drawn()]
        for name, rows in self._grids():
            first = [(row, [(tokens[0], probs[0]) for tokens, probs in cells]) for row, cells in rows]
            parts += [draw.heading(name, self._note()), draw.Grid(head, first)]
        return draw.group(*parts)

    def _repr_html_(self) -> str:
        head = ["behind block", *(html.visible(one.token) for one in self._drawn())]
        parts: list[str] = []
        for name, rows in self._grids():
            parts += [
                html.heading(name, self._note()),
                html.grid(head, [(row, [_cell(*cell) for cell in cells]) for row, cells in rows]),
            ]
        return html.page(*parts)

    def _grids(self) -> Iterator[tuple[str, list[tuple[str, list[Ranked]]]]]:
        """By lens, its blocks, the last one first, with what is read there at every token that is drawn."""
        for place, (name, layers) in enumerate(self.layers.items()):
            read = [one.results[place] for one in self._drawn()]
            yield (
                name,
                [
                    (str(layers[number]), [(one.top_tokens[number], one.top_probs[number]) for one in read])
                    for number in reversed(range(len(layers)))
                ],
            )


def _cell(tokens: Sequence[str], probs: Sequence[float]) -> str:
    """The likeliest one; all of them under the pointer."""
    said = ", ".join(f"{html.visible(one)} {share:.1%}" for one, share in zip(tokens, probs, strict=True))
    return html.marked(tokens[0], probs[0], said)
