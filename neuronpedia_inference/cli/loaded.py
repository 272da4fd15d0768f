"""A model in the process of a command."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from neuronpedia_inference.cli.output import console, working
from neuronpedia_inference.garbage import uncollected

if TYPE_CHECKING:
    from neuronpedia_inference.client.over_http import OverHttp
    from neuronpedia_inference.client.session import Client
    from neuronpedia_inference.runtime import Runtime
    from neuronpedia_inference.settings import Settings

ANSWER_TIMEOUT_S = 600.0


def load(settings: Settings) -> Runtime:
    """Load with the steps shown on standard error."""
    from neuronpedia_inference.observability import start_logging

    quiet = {} if "log_level" in settings.model_fields_set else {"log_level": "warning"}
    start_logging(settings.model_copy(update=quiet))
    errors = console(stderr=True)
    started = time.perf_counter()
    with uncollected(), working("Starting") as status:
        from neuronpedia_inference.runtime import Runtime

        def show(step: str) -> None:
            status.update(step)
            if not errors.is_terminal:
                errors.print(step, markup=False, highlight=False)

        runtime = Runtime.load(settings, show)
    errors.print(ready_line(runtime, time.perf_counter() - started), style="dim", markup=False, highlight=False)
    return runtime


def ready_line(runtime: Runtime, seconds: float) -> str:
    from neuronpedia_inference.observability import peak_memory_bytes

    model, n_sources = runtime.model, len(runtime.shelf.sources)
    saes = f"{n_sources} SAE{'' if n_sources == 1 else 's'}"
    peak = f"peak memory {peak_memory_bytes() / 2**20:.0f} MiB"
    return f"Ready in {seconds:.1f} s: {model.name} on {model.device}, {saes}, {peak}"


def service(url: str | None, settings: Settings) -> Client:
    """A server, or else a model in this process."""
    from neuronpedia_inference.client.session import Client

    if url is not None:
        return Client(server_at(url, settings))
    from neuronpedia_inference.client.in_process import InProcess

    return Client(InProcess(load(settings)))


def server_at(url: str, settings: Settings) -> OverHttp:
    """A server, with the secret of the environment; it is asked once."""
    from neuronpedia_inference.client.over_http import OverHttp

    key = None if settings.secret is None else settings.secret.get_secret_value()
    return OverHttp(url, key, timeout_s=ANSWER_TIMEOUT_S, patience_s=0)
