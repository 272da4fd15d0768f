"""Texts that end what is written, found where tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuronpedia_inference.cuts import Cut
from neuronpedia_inference.engine.tokens import TextCodec, TextStream


@dataclass(frozen=True)
class StopStrings:
    """End a row at the token that completes one of them. An `engine.protocol.Stops`."""

    codec: TextCodec
    strings: Sequence[str]

    def begin(self) -> StopReader:
        return StopReader(TextStream(self.codec), Cut(self.strings))


@dataclass(frozen=True)
class StopReader:
    """Of one row's text."""

    stream: TextStream
    cut: Cut

    def ends_at(self, token_id: int) -> bool:
        self.cut.push(self.stream.push(token_id))
        return self.cut.has_ended
