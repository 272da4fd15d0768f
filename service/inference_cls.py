"""The service on Modal. Deploy it, or run it once:

    modal deploy service/inference_cls.py
    modal run service/inference_cls.py --model-id smollm2-135m-instruct
    modal run service/inference_cls.py::download --model-id gemma-2-2b --sae-sets gemmascope-res-16k
    modal run service/inference_cls.py::batch --input prompts.jsonl --operation activations --output out.jsonl

and call it from anywhere, with nothing installed but modal:

    Inference = modal.Cls.from_name("neuronpedia-inference", "Inference")
    Inference().top_k.remote("The cat sat on the mat.")

What can be chosen: `options.py`. Errors that arrive at the caller: `errors.builtin_error`.
"""

# No `from __future__ import annotations`: modal reads the types of class parameters from the class itself.
import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import modal
import modal.experimental

from service import jobs
from service.errors import builtin_errors
from service.image import inference_image
from service.options import HOURS, Options
from service.volumes import MOUNT_PATH, optional_secret, weights_volume

if TYPE_CHECKING:
    from fastapi import FastAPI

    from neuronpedia_inference.loading import HostWeights
    from neuronpedia_inference.runtime import Runtime

OPTIONS = Options.read_or_exit()
SECRETS = optional_secret(OPTIONS.secret_name)
VOLUME = weights_volume(OPTIONS.volume_name)
IMAGE = inference_image(OPTIONS, has_secret=bool(SECRETS))
HEALTH_CHECK_S = 2.0

app = modal.App(OPTIONS.app_name, image=IMAGE)

Body = dict[str, Any]
Answer = dict[str, Any]


@app.cls(
    gpu=OPTIONS.gpu,
    cpu=OPTIONS.cpu,
    volumes={MOUNT_PATH: VOLUME},
    secrets=SECRETS,
    min_containers=OPTIONS.min_containers,
    max_containers=OPTIONS.max_containers,
    scaledown_window=OPTIONS.scaledown_window_s,
    timeout=OPTIONS.timeout_s,
    startup_timeout=OPTIONS.startup_timeout_s,
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True} if OPTIONS.gpu_snapshot else None,
)
@modal.concurrent(max_inputs=OPTIONS.max_inputs)
class Inference:
    """One model in one container: methods and web app on one event loop, over one `Runtime`.

    The parameters choose another model than the deployment's; each set of them has containers of its own. Empty
    ones, and 0, mean the deployment's default. Lists are JSON text, such as '["res-jb"]', or words.
    """

    model_id: str = modal.parameter(default="")
    sae_sets: str = modal.parameter(default="")
    override_model_id: str = modal.parameter(default="")
    custom_hf_model_id: str = modal.parameter(default="")
    include_sae: str = modal.parameter(default="")
    exclude_sae: str = modal.parameter(default="")
    model_dtype: str = modal.parameter(default="")
    sae_dtype: str = modal.parameter(default="")
    token_limit: int = modal.parameter(default=0)
    max_loaded_saes: int = modal.parameter(default=0)

    # Lifecycle

    @modal.enter(snap=True)
    async def prepare(self) -> None:
        """Up to the memory snapshot: what takes long and needs no GPU, which are imports and the model's weights.

        Nothing here may ask for CUDA, or the answer "none" would outlive the restore: so `sae_lens`, which asks when
        imported, comes later. With GPU_SNAPSHOT there is a GPU, and everything is loaded.
        """
        from neuronpedia_inference.loading import load_on_host

        self._runtime: Runtime | None = None
        self._host: HostWeights | None = None
        with _saying_why():
            settings = jobs.settings_of(jobs.parameters_of(self))
            self._host = await asyncio.to_thread(load_on_host, settings, _say)
        if OPTIONS.gpu_snapshot:
            await self._load()

    @modal.enter()
    async def start(self) -> None:
        """After the snapshot, or its restore: load what is not loaded, and serve only once the numbers are right."""
        import torch

        from service.self_test import self_test

        # Containers restored from one snapshot would all draw the same numbers.
        random.seed()
        torch.seed()
        if self._runtime is None:
            await self._load()
        assert self._runtime
        with _saying_why():
            await self_test(self._runtime)
        await VOLUME.commit.aio()
        self._started = time.monotonic()
        self._watching = asyncio.create_task(self._leave_when_unhealthy())
        _say(f"Ready: {self._runtime.model.name} on {self._runtime.model.device}, {len(self._runtime.sources)} SAEs")

    @modal.exit()
    async def stop(self) -> None:
        """Let what runs end, then say how much was answered."""
        if self._runtime is None:
            return
        self._watching.cancel()
        await asyncio.to_thread(self._runtime.close)
        counts = self._runtime.describe()["requests"]
        told = ", ".join(f"{counts.get(what, 0)} {what}" for what in ("answered", "failed", "cancelled"))
        _say(f"Stopped after {time.monotonic() - self._started:.0f} s: {told}")

    async def _load(self) -> None:
        from neuronpedia_inference.observability import start_logging, start_sentry
        from neuronpedia_inference.runtime import Runtime

        with _saying_why():
            self._settings = jobs.settings_of(jobs.parameters_of(self))
            start_logging(self._settings)
            start_sentry(self._settings)
            self._runtime = await asyncio.to_thread(Runtime.load, self._settings, _say, host=self._host)
        self._host = None

    async def _leave_when_unhealthy(self) -> None:
        """A device that has failed stays failed: take no more inputs, so that Modal replaces the container."""
        assert self._runtime
        while self._runtime.healthy:
            await asyncio.sleep(HEALTH_CHECK_S)
        _say("The device has failed: this container takes no more requests")
        leave: Any = modal.experimental.stop_fetching_inputs
        await leave.aio()

    async def _answer(self, operation: str, body: Any, fields: Body) -> Answer:
        from neuronpedia_inference.observability import bound_request_id, new_request_id
        from neuronpedia_inference.operations import answer, by_name

        with bound_request_id(new_request_id(modal.current_input_id() or "")), builtin_errors():
            return await answer(by_name[operation], jobs.merged(body, fields), self._serving())

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
        """`steer` as it is written: each item is the whole answer so far. Call with `.remote_gen`."""
        from neuronpedia_inference.operations import answer_events, by_name

        with builtin_errors():
            body = jobs.merged(jobs.prompted(prompt), fields)
            events: Any = await answer_events(by_name["steer"], body, self._serving())
            async with aclosing(events):
                async for event in events:
                    yield event

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

    # The service itself

    @modal.method()
    async def capabilities(self) -> Answer:
        """What is served here: model, sources, limits, state. The body of GET /v1/capabilities."""
        return self._serving().describe()

    @modal.asgi_app(label=f"{OPTIONS.app_name}-serve", custom_domains=OPTIONS.custom_domains or None)
    def serve(self) -> "FastAPI":
        """The same operations over HTTPS, with X-SECRET-KEY where the secret has SECRET."""
        from neuronpedia_inference.web.app import create_app

        return create_app(self._settings, self._serving)


# Jobs


def _inference(**chosen: Any) -> Any:
    """The containers of one configuration; empty values mean the deployment's."""
    cls: Any = Inference
    return cls(**jobs.as_parameters(chosen))


@app.function(cpu=OPTIONS.cpu, volumes={MOUNT_PATH: VOLUME}, secrets=SECRETS, timeout=6 * HOURS)
async def download(model_id: str = "", sae_sets: str = "") -> list[str]:
    """Put a model's weights and SAEs on the volume, so that no request waits for them. Returns what is there."""
    with builtin_errors():
        settings = jobs.settings_of({"model_id": model_id, "sae_sets": sae_sets})
        there = await asyncio.to_thread(jobs.fetch, settings, _say)
    await VOLUME.commit.aio()
    return there


@app.function(secrets=SECRETS, volumes={MOUNT_PATH: VOLUME}, timeout=OPTIONS.timeout_s + OPTIONS.startup_timeout_s)
async def run_inference_with_config(
    model_id: str = "",
    sae_sets: str | list[str] = "",
    model_dtype: str = "",
    sae_dtype: str = "",
    token_limit: int = 0,
    max_loaded_saes: int = 0,
    override_model_id: str = "",
    custom_hf_model_id: str = "",
    include_sae: str | list[str] = "",
    exclude_sae: str | list[str] = "",
    requests: list[Any] | None = None,
) -> Answer:
    """Load this configuration in a container of its own and answer `requests`: pairs of operation and body.

    Returns `{"status", "capabilities", "answers"}`; without requests, the first two are the proof that it loaded. A
    request that fails has `{"error": text}` in its place and does not stop the others.
    """
    inference = _inference(**{name: value for name, value in locals().items() if name != "requests"})
    asked = [jobs.asked_for(request) for request in requests or []]
    capabilities = await inference.capabilities.remote.aio()
    answers = [jobs.answer_or_error(getattr(inference, name).remote.aio(body)) for name, body in asked]
    return {"status": "healthy", "capabilities": capabilities, "answers": await asyncio.gather(*answers)}


@app.local_entrypoint()
def main(
    model_id: str = "",
    sae_sets: str = "",
    prompt: str = "The cat sat on the mat.",
    input: str = "",
    output: str = "",
    operation: str = "activations",
    fields: str = "",
) -> None:
    """Start a container and print the strongest feature of `prompt` as proof, or answer the lines of a file.

    With `--input` and `--output` it is the batch job of `batch.py`; `--fields` is a JSON object that each line's body
    starts from. `modal run service/inference_cls.py` accepts one entry point without a name, so these two are one.
    """
    inference = _inference(model_id=model_id, sae_sets=sae_sets)
    if input or output:
        _run_batch(inference, input, output, operation, fields)
        return
    capabilities = inference.capabilities.remote()
    sources = ", ".join(capabilities["sources"]) or "none"
    print(f"{capabilities['model']} on {capabilities['device']}, sources: {sources}")
    source_set = (capabilities["sae_sets"] or ["neurons"])[0]
    print(jobs.first_activation(inference.activations.remote(prompt, source_set=source_set, num_results=1)))


batch = main
"""`modal run service/inference_cls.py::batch --input prompts.jsonl --operation activations --output out.jsonl`"""


def _run_batch(inference: Any, input: str, output: str, operation: str, fields: str) -> None:
    from service.batch import BatchFailed, run

    if not (input and output):
        raise SystemExit("batch: needs both --input and --output")
    try:
        run(input, output, operation, fields, lambda name: getattr(inference, name).map)
    except BatchFailed as exc:
        raise SystemExit(f"batch: {exc}") from None


@contextmanager
def _saying_why() -> Iterator[None]:
    """What keeps a container from serving is one line in its log, and the error that its callers get."""
    try:
        with builtin_errors():
            yield
    except RuntimeError as exc:
        _say(f"This container does not serve. {exc}")
        raise


def _say(line: str) -> None:
    """To the container's log, where `modal app logs` shows it."""
    print(line, flush=True)
