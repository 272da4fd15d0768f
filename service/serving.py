"""One model in one container: how it starts, answers and ends. The classes of `inference_cls.py` are made of this."""

# No `from __future__ import annotations`: modal reads the types of methods from the class itself.
import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import modal
import modal.exception
import modal.experimental

from neuronpedia_inference.garbage import settle, uncollected
from neuronpedia_inference.settings import Settings, given_names, near_misses, variable
from service import jobs, snapshot
from service.errors import builtin_errors
from service.options import OTHERS, SECRETS, Options

if TYPE_CHECKING:
    from neuronpedia_inference.loading import HostWeights, Loaded
    from neuronpedia_inference.runtime import Runtime

HEALTH_CHECK_S = 2.0
DRAIN_S = 25.0
"""Modal ends a container 30 s after it was told to stop."""

Body = dict[str, Any]
Answer = dict[str, Any]


class Serving:
    """Methods over one `Runtime`, all on one event loop."""

    options: ClassVar[Options]
    volume: ClassVar[modal.Volume]

    def wanted(self) -> Settings:
        """What this container is to serve. Raises StartupError, or InvalidRequest for what a caller may not have."""
        return Settings.read()

    # Lifecycle

    @modal.enter(snap=True)
    async def prepare(self) -> None:
        """Up to the memory snapshot: all that can be done on the device that there is now.

        For a GPU that comes with the restore these are imports, downloads and the model's weights; without a GPU, and
        with GPU_SNAPSHOT, everything but the worker. It all runs on this thread, so that none is left behind.
        """
        self._runtime: Runtime | None = None
        self._host: HostWeights | None = None
        self._loaded: Loaded | None = None
        is_gpu_to_come = bool(self.options.gpu) and not self.options.gpu_snapshot
        with _saying_why():
            self._prepared = self.wanted()
        with uncollected(), _saying_why(), snapshot.without_cuda() if is_gpu_to_come else nullcontext():
            snapshot.import_everything()

            from neuronpedia_inference import loading

            self._found_out = snapshot.found_out()
            if loading.fetch_everything(self._prepared, say):
                await self._commit("downloads")
            self._host = snapshot.own_weights(loading.load_on_host(self._prepared, say))
            if not is_gpu_to_come:
                self._loaded = snapshot.own_saes(loading.load(self._prepared, say, self._host))
            settle()
        snapshot.close_connections()

    @modal.enter()
    async def start(self) -> None:
        """After the snapshot, or its restore: load what is not loaded, and serve only once the numbers are right."""
        import torch

        from neuronpedia_inference.checks import self_test
        from neuronpedia_inference.operations.openai.asking import check_variants

        # Containers restored from one snapshot would all draw the same numbers.
        started = time.monotonic()
        random.seed()
        torch.seed()
        with _saying_why():
            self._runtime = self._load()
            await check_variants(self._runtime)
            await self_test(self._runtime)
        settle()
        self._runtime.metrics.reset()
        self._started = time.monotonic()
        self._watching = asyncio.create_task(self._leave_when_unhealthy())
        model, n_saes = self._runtime.model, len(self._runtime.shelf.sources)
        seconds = time.monotonic() - started
        say(f"Ready: {model.name} on {model.device}, {n_saes} SAEs, {seconds:.2f} s after the snapshot")
        if snapshot.found_out() != self._found_out:
            await self._commit("measurements")

    @modal.exit()
    async def stop(self) -> None:
        """Let what runs end, then say how much was answered."""
        if self._runtime is None:
            return
        self._watching.cancel()
        # Not by the loop's own threads: Modal waits for those, however long they take.
        closing = threading.Thread(target=self._runtime.close, name="closing", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, DRAIN_S)
        if closing.is_alive():
            say(f"Requests that still run after {DRAIN_S:.0f} s are given up")
        counts = self._runtime.describe()["requests"]
        told = ", ".join(f"{counts.get(what, 0)} {what}" for what in ("answered", "failed", "cancelled"))
        say(f"Stopped after {time.monotonic() - self._started:.0f} s: {told}")

    def _load(self) -> "Runtime":
        """With the settings of now: the secret may have changed since the snapshot. Raises StartupError."""
        from neuronpedia_inference.observability import start_logging, start_sentry
        from neuronpedia_inference.runtime import Runtime

        self._settings = self.wanted()
        start_logging(self._settings)
        for miss in near_misses(given_names(), OTHERS):
            say(miss)
        start_sentry(self._settings)
        host, loaded, self._host, self._loaded = self._host, self._loaded, None, None
        if loaded is not None and _load_the_same(self._prepared, self._settings):
            return Runtime(self._settings, loaded)
        return Runtime.load(self._settings, say, host=host)

    async def _commit(self, what: str) -> None:
        """What was downloaded or measured outlives this container; if it cannot, the next one does it again."""
        try:
            await self.volume.commit.aio()
        except modal.exception.Error as exc:
            say(f"The {what} could not be kept on the volume: {exc}")

    async def _leave_when_unhealthy(self) -> None:
        """A device that has failed stays failed: take no more inputs, so that Modal replaces the container."""
        assert self._runtime
        while self._runtime.healthy:
            await asyncio.sleep(HEALTH_CHECK_S)
        say("The device has failed: this container takes no more requests")
        leave: Any = modal.experimental.stop_fetching_inputs
        await leave.aio()

    async def _answer(self, operation: str, body: Any, fields: Body) -> Any:
        """A dictionary; where the answer may be tensors and `format` says so, bytes or a dictionary with arrays."""
        from neuronpedia_inference.observability import bound_request_id, new_request_id
        from neuronpedia_inference.operations import answer, answer_pieces, by_name

        with bound_request_id(new_request_id(modal.current_input_id() or "")), builtin_errors():
            wanted = jobs.merged(body, fields)
            form = wanted.get("format") if by_name[operation].has_tensors else None
            if form not in jobs.TENSORS:
                return await answer(by_name[operation], wanted, self._serving())
            asked = {**wanted, "format": "safetensors"}
            async with aclosing(await answer_pieces(by_name[operation], asked, self._serving())) as pieces:
                return jobs.in_form(form, b"".join([piece async for piece in pieces]))

    async def _events(self, operation: str, body: Body) -> AsyncIterator[Answer]:
        from neuronpedia_inference.operations import answer_events, by_name

        with builtin_errors():
            events: Any = await answer_events(by_name[operation], body, self._serving())
            async with aclosing(events):
                async for event in events:
                    yield event

    def _serving(self) -> "Runtime":
        assert self._runtime
        return self._runtime

    # Methods for people: the prompt first, everything else by name

    @modal.method()
    async def activations(self, prompt: str | list[str] | Body, **fields: Any) -> Answer:
        """The strongest features of one prompt or several, or one by its index. Fields: `ActivationsRequest`."""
        return await self._answer("activations", jobs.prompted(prompt), fields)

    @modal.method()
    async def top_k(self, prompt: str | list[str] | Body, **fields: Any) -> Answer:
        """The strongest features at each token of one prompt or several. Fields: `TopKRequest`."""
        return await self._answer("top_k", jobs.prompted(prompt), fields)

    @modal.method()
    async def steer(self, prompt: str | list[Body] | Body, **fields: Any) -> Answer:
        """A text or a chat, steered and not. Fields: `SteerRequest`."""
        return await self._answer("steer", jobs.prompted(prompt), fields)

    @modal.method()
    async def steer_stream(self, prompt: str | list[Body] | Body, **fields: Any) -> AsyncIterator[Answer]:
        """`steer` as it is written: each item is the whole answer so far, or with `deltas` what is new in it.

        Call with `.remote_gen`.
        """
        async for event in self._events("steer", jobs.merged(jobs.prompted(prompt), fields)):
            yield event

    @modal.method()
    async def score(self, prompt: str | list[Body] | Body, **fields: Any) -> Answer:
        """How likely continuations are, token by token, under any steering. Fields: `ScoreRequest`."""
        return await self._answer("score", jobs.prompted(prompt), fields)

    @modal.method()
    async def sweep(self, prompt: str | list[Body] | Body, **fields: Any) -> Answer:
        """One prompt at several strengths and seeds. Fields: `SweepRequest`."""
        return await self._answer("sweep", jobs.prompted(prompt), fields)

    # Methods of the wire: the body of the HTTP route, as one dictionary or as keywords

    @modal.method()
    async def activation_single(self, body: Body | None = None, **fields: Any) -> Answer:
        """One feature, or one vector, on one prompt."""
        return await self._answer("activation_single", body, fields)

    @modal.method()
    async def activation_single_batch(self, body: Body | None = None, **fields: Any) -> Answer:
        """One feature, or one vector, on several prompts."""
        return await self._answer("activation_single_batch", body, fields)

    @modal.method()
    async def activation_all(self, body: Body | None = None, **fields: Any) -> Answer:
        """The strongest features of a source set on one prompt."""
        return await self._answer("activation_all", body, fields)

    @modal.method()
    async def activation_all_batch(self, body: Body | None = None, **fields: Any) -> Answer:
        """The strongest features of a source set on several prompts."""
        return await self._answer("activation_all_batch", body, fields)

    @modal.method()
    async def activation_topk_by_token(self, body: Body | None = None, **fields: Any) -> Answer:
        """The strongest features at each token of one prompt."""
        return await self._answer("activation_topk_by_token", body, fields)

    @modal.method()
    async def activation_topk_by_token_batch(self, body: Body | None = None, **fields: Any) -> Answer:
        """The strongest features at each token of several prompts."""
        return await self._answer("activation_topk_by_token_batch", body, fields)

    @modal.method()
    async def activation_source(self, body: Body | None = None, **fields: Any) -> Answer:
        """Every feature of a source that fires on the prompts."""
        return await self._answer("activation_source", body, fields)

    @modal.method()
    async def steer_completion(self, body: Body | None = None, **fields: Any) -> Answer:
        """A steered text."""
        return await self._answer("steer_completion", body, fields)

    @modal.method()
    async def steer_completion_chat(self, body: Body | None = None, **fields: Any) -> Answer:
        """A steered chat."""
        return await self._answer("steer_completion_chat", body, fields)

    @modal.method()
    async def tokenize(self, body: Body | None = None, **fields: Any) -> Answer:
        """A text's tokens."""
        return await self._answer("tokenize", body, fields)

    @modal.method()
    async def util_sae_vector(self, body: Body | None = None, **fields: Any) -> Answer:
        """A feature's vector."""
        return await self._answer("util_sae_vector", body, fields)

    @modal.method()
    async def util_sae_topk_by_decoder_cossim(self, body: Body | None = None, **fields: Any) -> Answer:
        """The features whose decoder rows are nearest to a vector or to another feature's."""
        return await self._answer("util_sae_topk_by_decoder_cossim", body, fields)

    @modal.method()
    async def util_similarity_matrix_pred(self, body: Body | None = None, **fields: Any) -> Answer:
        """How alike the predictions of a temporal SAE are for the tokens of a text."""
        return await self._answer("util_similarity_matrix_pred", body, fields)

    @modal.method()
    async def activation_attention(self, body: Body | None = None, **fields: Any) -> Answer:
        """Where one attention head looks."""
        return await self._answer("activation_attention", body, fields)

    @modal.method()
    async def activation_raw(self, body: Body | None = None, **fields: Any) -> Answer:
        """The residual stream behind layers, at each prompt's last token."""
        return await self._answer("activation_raw", body, fields)

    @modal.method()
    async def apply_chat_template(self, body: Body | None = None, **fields: Any) -> Answer:
        """A chat as the model reads it, token by token with the message it belongs to."""
        return await self._answer("apply_chat_template", body, fields)

    @modal.method()
    async def lens_prompt(self, body: Body | None = None, **fields: Any) -> Answer:
        """What the model would say behind each of its blocks, at every token, all at once."""
        return await self._answer("lens_prompt", body, fields)

    @modal.method()
    async def lens_prompt_stream(self, body: Body | None = None, **fields: Any) -> AsyncIterator[Answer]:
        """`lens_prompt` as it becomes known: meta, prompt, a token at a time, done. Call with `.remote_gen`."""
        async for frame in self._events("lens_prompt", jobs.merged(body, fields)):
            yield frame

    @modal.method()
    async def steer_health(self, body: Body | None = None, **fields: Any) -> Answer:
        """How busy this container is, and what memory it takes."""
        return await self._answer("steer_health", body, fields)

    @modal.method()
    async def persona_monitor(self, body: Body | None = None, **fields: Any) -> Answer:
        """Where the assistant's messages lie on the persona axes."""
        return await self._answer("persona_monitor", body, fields)

    # Features themselves

    @modal.method()
    async def search(self, q: str | Body, **fields: Any) -> Answer:
        """Features by words of their labels and contexts. Fields: `SearchRequest`."""
        return await self._answer("search", {"q": q} if isinstance(q, str) else q, fields)

    @modal.method()
    async def feature(self, source: str | Body, index: int | None = None, **fields: Any) -> Answer:
        """Everything known of one feature. Fields: `FeatureRequest`."""
        body = {"source": source, "index": index} if isinstance(source, str) else source
        return await self._answer("feature", body, fields)

    @modal.method()
    async def contrast(self, a: list[str] | Body, b: list[str] | None = None, **fields: Any) -> Answer:
        """The features that separate two sets of texts. Fields: `ContrastRequest`."""
        return await self._answer("contrast", {"a": a, "b": b} if isinstance(a, list) else a, fields)

    @modal.method()
    async def capture(self, prompt: str | list[Any] | Body, points: list[str] | None = None, **fields: Any) -> Any:
        """The vectors that pass at points. Fields: `CaptureRequest`. With `format="safetensors"` the bytes of a file:
        `safetensors.numpy.load(bytes)` gives arrays by the name of their point; with `format="numpy"` a dictionary of
        `tensors`, these arrays, and `answer`, everything else.
        """
        body = jobs.prompted(prompt) | ({} if points is None else {"points": points})
        return await self._answer("capture", body, fields)

    # The service itself

    @modal.method()
    async def answer_many(self, operation: str, bodies: list[Body]) -> list[Answer]:
        """Many bodies of one operation, in one call: for each `{"answer"}`, or `{"error", "kind"}`."""
        with builtin_errors():
            jobs.check_operation(operation)
        return await asyncio.gather(*(jobs.outcome_of(partial(self._answer, operation, body, {})) for body in bodies))

    @modal.method()
    async def capabilities(self) -> Answer:
        """What is served here: model, sources, limits, state. The body of GET /v1/capabilities."""
        return self._serving().describe()


def _load_the_same(one: Settings, other: Settings) -> bool:
    """Whether what is loaded for one set of settings is what the other asks for; secrets are not loaded."""
    fields = {field for field in Settings.model_fields if variable(field) not in SECRETS}
    return all(getattr(one, field) == getattr(other, field) for field in fields)


@contextmanager
def _saying_why() -> Iterator[None]:
    """What keeps a container from serving is one line in its log, and the error that its callers get."""
    try:
        with builtin_errors():
            yield
    except (RuntimeError, ValueError) as exc:
        say(f"This container does not serve. {exc}")
        raise


def say(line: str) -> None:
    """To the container's log, where `modal app logs` shows it."""
    print(line, flush=True)
