"""A service as an object with methods, for threads and for coroutines. Both have the same methods."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from neuronpedia_inference.client import calls
from neuronpedia_inference.client.calls import Call, Messages, TensorCall
from neuronpedia_inference.client.captures import Captured, difference, in_parts
from neuronpedia_inference.client.corpus import Say, corpus, quiet
from neuronpedia_inference.client.lens_grid import LensGrid
from neuronpedia_inference.client.replays import Replay
from neuronpedia_inference.client.results import (
    Contrast,
    Feature,
    Features,
    SearchResults,
    TopFeatures,
)
from neuronpedia_inference.client.steering import OfFeature, Steering, Vector
from neuronpedia_inference.client.swept import Scores, Sweep
from neuronpedia_inference.client.transports import AsyncTransport, Transport
from neuronpedia_inference.client.written import Steered
from neuronpedia_inference.errors import InvalidRequest

Out = TypeVar("Out")


class Client:
    """One service. Methods take the fields of the operation of the same name; what is left out is the service's choice.

    Every method raises InferenceError of the class that the service raised, with its `request_id`.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __repr__(self) -> str:
        return f"Client({self._transport!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what it holds; a service in this process ends."""
        self._transport.close()

    def capabilities(self) -> dict[str, Any]:
        """What the service says of itself: model, sources, limits."""
        return self._transport.capabilities()

    @property
    def sources(self) -> list[str]:
        """Names of its SAEs."""
        return list(self.capabilities()["sources"])

    @overload
    def features(self, text: str, source: str | None = None, **fields: Any) -> Features: ...

    @overload
    def features(
        self, text: list[str] | tuple[str, ...], source: str | None = None, **fields: Any
    ) -> list[Features]: ...

    def features(
        self, text: str | list[str] | tuple[str, ...], source: str | None = None, **fields: Any
    ) -> Features | list[Features]:
        """The features that fire most on a text, or on each of several."""
        if isinstance(text, str):
            return self._ask(calls.features(text, source=source, **fields))
        return self._ask(calls.features_of_several(text, source=source, **fields))

    def top_k(self, text: str, source: str | None = None, **fields: Any) -> TopFeatures:
        """The strongest features at every token of a text."""
        return self._ask(calls.top_k(text, source=source, **fields))

    def feature(self, name: str | OfFeature, index: int | None = None, **fields: Any) -> Feature:
        """Everything known of a feature: `feature("15-res-4k", 1113)`, `feature("15-res-4k/1113")`, or the address of
        its page on Neuronpedia."""
        return self._ask(calls.feature(name, index, **fields))

    def search(self, q: str, source: str | None = None, **fields: Any) -> SearchResults:
        """Features by words."""
        return self._ask(calls.search(q, source=source, **fields))

    def contrast(self, a: Sequence[str], b: Sequence[str], **fields: Any) -> Contrast:
        """The features that separate two sets of texts."""
        return self._ask(calls.contrast(a, b, **fields))

    def capture(
        self,
        prompt: str | Sequence[str] | Messages,
        points: str | Sequence[str],
        steering: Steering | None = None,
        **fields: Any,
    ) -> list[Captured]:
        """The vectors that pass at points, such as `"blocks.15.hook_resid_post"`, steered or plain, one result for
        each text."""
        return self._ask_tensors(calls.capture(prompt, points, steering, **fields))

    def mean_difference(self, a: Sequence[str], b: Sequence[str], point: str) -> Vector:
        """The vector from the texts of b to those of a at a point: the difference of the means of both sides, each
        over its texts' means over their tokens, special ones aside."""
        sides = [
            [one for part in in_parts(side) for one in self.capture(part, point, positions="mean")] for side in (a, b)
        ]
        return difference(sides[0], sides[1], point)

    def keep(self, vector: Vector) -> Vector:
        """The same by the digest under which the service keeps it from now on, so that requests with it are short."""
        return self._ask(calls.keep(vector))

    def steer(self, prompt: str | Messages, steering: Steering | None = None, **fields: Any) -> Steered:
        """What the model writes steered, and what it writes by itself. `watch=[feature, ...]` shows where they fire."""
        return self._ask(calls.steer(prompt, steering, **fields))

    def stream(self, prompt: str | Messages, steering: Steering | None = None, **fields: Any) -> Iterator[Steered]:
        """As `steer`, while it is written: each item is everything so far."""
        call = calls.steer(prompt, steering, **fields)
        return map(call.read, self._transport.stream(call.operation, call.body))

    def chat(self, steering: Steering | None = None, **fields: Any) -> Chat:
        """A chat that keeps its turns: call it with what the user says."""
        return Chat(self, steering, fields)

    def replay(self, receipt: Mapping[str, Any]) -> Replay:
        """Run a receipt again, or an answer that has one, and compare. Raises InvalidRequest for what is neither."""
        return self._ask(calls.replay(receipt))

    def sweep(
        self, prompt: str | Sequence[str], makers: calls.Makers, strengths: Sequence[float], **fields: Any
    ) -> Sweep:
        """The same prompts steered at several strengths by features or steerings, each by itself, and plain; with the
        strength that is best of them. `seeds=[1, 2]` for several texts of each."""
        return self._ask(calls.sweep(prompt, makers, strengths, **fields))

    def score(
        self, prompt: str, continuations: Sequence[str], steering: Steering | None = None, **fields: Any
    ) -> Scores:
        """How likely the model finds continuations, steered or plain."""
        return self._ask(calls.score(prompt, continuations, steering, **fields))

    def lens(self, prompt: str | Messages, type: str | Sequence[str] = "LOGIT_LENS", **fields: Any) -> LensGrid:
        """What the model would say next behind each of its blocks, at every token: by the logit lens, by
        `"JACOBIAN_LENS"`, or by both. `layers=[10, 20]` for some blocks, `num_completion_tokens=4` to write on."""
        model = self.capabilities()["model"]
        return self._ask(calls.lens(prompt, type, model, **fields))

    def corpus(self, texts: Iterable[str], to: str | Path, *, say: Say = quiet, **fields: Any) -> int:
        """The features of every text, a line each in the file `to`, which is gone on with where it was left.

        How many texts were new. `read_corpus(to)` reads them. A text that is refused has what was said in its line.
        """
        steps = corpus(texts, to, say, fields)
        try:
            call = next(steps)
            while True:
                try:
                    found = self._ask(call)
                except InvalidRequest as exc:
                    call = steps.throw(exc)
                else:
                    call = steps.send(found)
        except StopIteration as stop:
            return stop.value
        finally:
            steps.close()

    def _ask(self, call: Call[Out]) -> Out:
        return call.read(self._transport.ask(call.operation, call.body))

    def _ask_tensors(self, call: TensorCall[Out]) -> Out:
        return call.read(self._transport.ask_tensors(call.operation, call.body))


@dataclass
class Chat:
    """The turns of a chat so far. `chat("Hello")` says something and gives the answer; `messages` are both sides."""

    client: Client
    steering: Steering | None
    fields: Mapping[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, said: str) -> Steered:
        """The steered answer joins the chat."""
        turns = [*self.messages, {"role": "user", "content": said}]
        answered = self.client.steer(turns, self.steering, **self.fields)
        self.messages = turns_after(turns, answered)
        return answered

    def __repr__(self) -> str:
        return f"Chat({len(self.messages)} messages, {self.steering or Steering()!r})"


class AsyncClient:
    """As Client, for coroutines."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    def __repr__(self) -> str:
        return f"AsyncClient({self._transport!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give back what it holds; a service in this process ends."""
        await self._transport.close()

    async def capabilities(self) -> dict[str, Any]:
        """What the service says of itself: model, sources, limits."""
        return await self._transport.capabilities()

    @overload
    async def features(self, text: str, source: str | None = None, **fields: Any) -> Features: ...

    @overload
    async def features(
        self, text: list[str] | tuple[str, ...], source: str | None = None, **fields: Any
    ) -> list[Features]: ...

    async def features(
        self, text: str | list[str] | tuple[str, ...], source: str | None = None, **fields: Any
    ) -> Features | list[Features]:
        """The features that fire most on a text, or on each of several."""
        if isinstance(text, str):
            return await self._ask(calls.features(text, source=source, **fields))
        return await self._ask(calls.features_of_several(text, source=source, **fields))

    async def top_k(self, text: str, source: str | None = None, **fields: Any) -> TopFeatures:
        """The strongest features at every token of a text."""
        return await self._ask(calls.top_k(text, source=source, **fields))

    async def feature(self, name: str | OfFeature, index: int | None = None, **fields: Any) -> Feature:
        """Everything known of a feature."""
        return await self._ask(calls.feature(name, index, **fields))

    async def search(self, q: str, source: str | None = None, **fields: Any) -> SearchResults:
        """Features by words."""
        return await self._ask(calls.search(q, source=source, **fields))

    async def contrast(self, a: Sequence[str], b: Sequence[str], **fields: Any) -> Contrast:
        """The features that separate two sets of texts."""
        return await self._ask(calls.contrast(a, b, **fields))

    async def capture(
        self,
        prompt: str | Sequence[str] | Messages,
        points: str | Sequence[str],
        steering: Steering | None = None,
        **fields: Any,
    ) -> list[Captured]:
        """The vectors that pass at points, such as `"blocks.15.hook_resid_post"`, steered or plain, one result for
        each text."""
        return await self._ask_tensors(calls.capture(prompt, points, steering, **fields))

    async def mean_difference(self, a: Sequence[str], b: Sequence[str], point: str) -> Vector:
        """The vector from the texts of b to those of a at a point, as `Client.mean_difference`."""
        sides = [
            [one for part in in_parts(side) for one in await self.capture(part, point, positions="mean")]
            for side in (a, b)
        ]
        return difference(sides[0], sides[1], point)

    async def keep(self, vector: Vector) -> Vector:
        """The same by the digest under which the service keeps it from now on, so that requests with it are short."""
        return await self._ask(calls.keep(vector))

    async def steer(self, prompt: str | Messages, steering: Steering | None = None, **fields: Any) -> Steered:
        """What the model writes steered, and what it writes by itself. `watch=[feature, ...]` shows where they fire."""
        return await self._ask(calls.steer(prompt, steering, **fields))

    async def stream(
        self, prompt: str | Messages, steering: Steering | None = None, **fields: Any
    ) -> AsyncIterator[Steered]:
        """As `steer`, while it is written: each item is everything so far."""
        call = calls.steer(prompt, steering, **fields)
        async for event in self._transport.stream(call.operation, call.body):
            yield call.read(event)

    def chat(self, steering: Steering | None = None, **fields: Any) -> AsyncChat:
        """A chat that keeps its turns: await a call with what the user says."""
        return AsyncChat(self, steering, fields)

    async def replay(self, receipt: Mapping[str, Any]) -> Replay:
        """Run a receipt again, or an answer that has one, and compare. Raises InvalidRequest for what is neither."""
        return await self._ask(calls.replay(receipt))

    async def sweep(
        self, prompt: str | Sequence[str], makers: calls.Makers, strengths: Sequence[float], **fields: Any
    ) -> Sweep:
        """The same prompts steered at several strengths by features or steerings, each by itself, and plain; with the
        strength that is best of them. `seeds=[1, 2]` for several texts of each."""
        return await self._ask(calls.sweep(prompt, makers, strengths, **fields))

    async def score(
        self, prompt: str, continuations: Sequence[str], steering: Steering | None = None, **fields: Any
    ) -> Scores:
        """How likely the model finds continuations, steered or plain."""
        return await self._ask(calls.score(prompt, continuations, steering, **fields))

    async def lens(self, prompt: str | Messages, type: str | Sequence[str] = "LOGIT_LENS", **fields: Any) -> LensGrid:
        """What the model would say next behind each of its blocks, at every token: by the logit lens, by
        `"JACOBIAN_LENS"`, or by both. `layers=[10, 20]` for some blocks, `num_completion_tokens=4` to write on."""
        model = (await self.capabilities())["model"]
        return await self._ask(calls.lens(prompt, type, model, **fields))

    async def corpus(self, texts: Iterable[str], to: str | Path, *, say: Say = quiet, **fields: Any) -> int:
        """The features of every text, a line each in the file `to`, which is gone on with where it was left.

        How many texts were new. `read_corpus(to)` reads them. A text that is refused has what was said in its line.
        """
        steps = corpus(texts, to, say, fields)
        try:
            call = next(steps)
            while True:
                try:
                    found = await self._ask(call)
                except InvalidRequest as exc:
                    call = steps.throw(exc)
                else:
                    call = steps.send(found)
        except StopIteration as stop:
            return stop.value
        finally:
            steps.close()

    async def _ask(self, call: Call[Out]) -> Out:
        return call.read(await self._transport.ask(call.operation, call.body))

    async def _ask_tensors(self, call: TensorCall[Out]) -> Out:
        return call.read(await self._transport.ask_tensors(call.operation, call.body))


@dataclass
class AsyncChat:
    """As Chat, for coroutines."""

    client: AsyncClient
    steering: Steering | None
    fields: Mapping[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    async def __call__(self, said: str) -> Steered:
        """The steered answer joins the chat."""
        turns = [*self.messages, {"role": "user", "content": said}]
        answered = await self.client.steer(turns, self.steering, **self.fields)
        self.messages = turns_after(turns, answered)
        return answered


def turns_after(turns: Sequence[dict[str, str]], answered: Steered) -> list[dict[str, str]]:
    """The chat with the steered answer, as the service tells it."""
    if answered.steered.messages is not None:
        return [dict(message) for message in answered.steered.messages]
    return [*turns, {"role": "assistant", "content": answered.steered.text}]
