"""The service on Modal. Deploy it, or run it once:

    modal deploy service/inference_cls.py
    modal run service/inference_cls.py --model-id smollm2-135m-instruct
    modal run service/inference_cls.py::download --model-id gemma-2-2b --sae-sets gemmascope-res-16k
    modal run service/inference_cls.py::batch --input prompts.jsonl --operation activations --output out.jsonl

and call it from anywhere, with nothing installed but modal:

    Inference = modal.Cls.from_name("neuronpedia-inference", "Inference")
    Inference().top_k.remote("The cat sat on the mat.")

`Inference` serves the deployment's model, by methods and over HTTPS. `AnyModel` serves a model that the caller names,
by methods only: whoever can start containers for a model must hold a token of the workspace.

What can be chosen: `options.py`. Errors that arrive at the caller: `errors.builtin_error`.
"""

# No `from __future__ import annotations`: modal reads the types of class parameters from the class itself.
import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import modal
import modal.exception

from neuronpedia_inference.settings import Settings
from service import jobs
from service.allowed import check_models
from service.deployment import Plan, prepare, requested, summary, tell_when_done
from service.errors import builtin_errors
from service.image import inference_image
from service.options import HOURS, Options
from service.serving import Answer, Body, Serving, say
from service.volumes import MOUNT_PATH, keys_of, optional_secret, weights_volume

if TYPE_CHECKING:
    from fastapi import FastAPI

OPTIONS = Options.read_or_exit()
SECRETS = optional_secret(OPTIONS.secret_name)
VOLUME = weights_volume(OPTIONS.volume_name)
IMAGE = inference_image(OPTIONS, has_secret=bool(SECRETS))
KEYS = keys_of(SECRETS) if modal.is_local() else None
PLAN = prepare(OPTIONS, KEYS) if modal.is_local() else None

app = modal.App(OPTIONS.app_name, image=IMAGE)

CONTAINER: dict[str, Any] = {
    "gpu": OPTIONS.gpu,
    "cpu": OPTIONS.cpu,
    "volumes": {MOUNT_PATH: VOLUME},
    "secrets": SECRETS,
    "max_containers": OPTIONS.max_containers,
    "scaledown_window": OPTIONS.scaledown_window_s,
    "buffer_containers": OPTIONS.buffer_containers or None,
    "retries": OPTIONS.retries or None,
    "region": OPTIONS.region or None,
    "cloud": OPTIONS.cloud,
    "timeout": OPTIONS.timeout_s,
    "startup_timeout": OPTIONS.startup_timeout_s,
    "enable_memory_snapshot": True,
    "experimental_options": {"enable_gpu_snapshot": True} if OPTIONS.gpu_snapshot else None,
}


@app.cls(**CONTAINER, **requested(OPTIONS, PLAN), min_containers=OPTIONS.min_containers)
@modal.concurrent(max_inputs=OPTIONS.max_inputs, target_inputs=OPTIONS.target_inputs)
class Inference(Serving):
    """The deployment's model: methods and web app over one `Runtime`.

    It has no parameters. On a web address they would be query values, and each set of them is a pool of containers of
    its own, started before anybody looks at a secret.
    """

    options = OPTIONS
    volume = VOLUME

    @modal.asgi_app(
        label=f"{OPTIONS.app_name}-serve",
        custom_domains=OPTIONS.custom_domains or None,
        requires_proxy_auth=OPTIONS.proxy_auth,
    )
    def serve(self) -> "FastAPI":
        """The same operations over HTTPS, with X-SECRET-KEY where the secret has SECRET."""
        from neuronpedia_inference.web.app import create_app

        return create_app(self._settings, self._serving, own_hosts=("*.modal.run", *OPTIONS.custom_domains))


@app.cls(**CONTAINER, **requested(OPTIONS, None))
@modal.concurrent(max_inputs=OPTIONS.max_inputs, target_inputs=OPTIONS.target_inputs)
class AnyModel(Serving):
    """A model that the caller names, from MODELS. Each set of parameters has containers of its own, and no web address.

    Empty parameters, and 0, mean the deployment's default. Lists are JSON text, such as '["res-jb"]', or words.
    """

    options = OPTIONS
    volume = VOLUME

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

    def wanted(self) -> Settings:
        """The deployment's settings with the parameters over them."""
        chosen = jobs.parameters_of(self)
        check_models(chosen, OPTIONS.models, Settings.read())
        return jobs.settings_of(chosen)


# Jobs


def _model(deployed: str = "", **chosen: Any) -> Any:
    """The containers of one configuration: the deployment's own where nothing is chosen. deployed: name of an app."""
    parameters = jobs.as_parameters(chosen)
    cls: Any = AnyModel if parameters else Inference
    if deployed:
        cls = modal.Cls.from_name(deployed, "AnyModel" if parameters else "Inference")
    return cls(**parameters)


@app.function(cpu=OPTIONS.cpu, volumes={MOUNT_PATH: VOLUME}, secrets=SECRETS, timeout=6 * HOURS)
async def download(model_id: str = "", sae_sets: str = "") -> list[str]:
    """Put a model's weights and SAEs on the volume, so that no request waits for them. Returns what is there."""
    chosen = {"model_id": model_id, "sae_sets": sae_sets}
    with builtin_errors():
        check_models(chosen, OPTIONS.models, Settings.read())
        settings = jobs.settings_of(chosen)
        there = await asyncio.to_thread(jobs.fetch, settings, say)
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
    chosen = {name: value for name, value in locals().items() if name != "requests"}
    with builtin_errors():
        check_models(chosen, OPTIONS.models, Settings.read())
    inference = _model(**chosen)
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
    app: str = "",
) -> None:
    """Start a container and print the strongest feature of `prompt` as proof, or answer the lines of a file.

    With `--input` and `--output` it is the batch job of `batch.py`; `--fields` is a JSON object that each line's body
    starts from. With `--app` what is deployed under that name answers. `modal run service/inference_cls.py` accepts one
    entry point without a name, so these two are one.
    """
    inference = _model(app, model_id=model_id, sae_sets=sae_sets)
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

    async def ask(name: str, bodies: list[Body]) -> list[Any]:
        try:
            return jobs.as_exceptions(await inference.answer_many.remote.aio(name, bodies))
        except (*jobs.RAISED, modal.exception.Error) as exc:
            return [exc] * len(bodies)

    try:
        counts = asyncio.run(run(input, output, operation, fields, ask))
    except BatchFailed as exc:
        raise SystemExit(f"batch: {exc}") from None
    raise SystemExit(counts.exit_code)


def _summary(plan: Plan) -> str:
    deployed: Any = Inference
    return summary(OPTIONS, plan, keys=KEYS, address=deployed().serve.get_web_url())


if PLAN is not None:
    tell_when_done(partial(_summary, PLAN))
