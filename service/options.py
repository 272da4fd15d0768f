"""Everything that is chosen at deploy time, read from the deploying shell's environment and checked before use.

    GPU=L4 MODEL_ID=gemma-2-2b SAE_SETS=gemmascope-res-16k modal deploy service/inference_cls.py

To choose in a file instead, edit `DEFAULTS`. The container reads the same choices from its image's environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuronpedia_inference.errors import StartupError, unknown_name
from neuronpedia_inference.memory import GPUS
from neuronpedia_inference.settings import Settings, variable
from service.allowed import is_name

MINUTES = 60
HOURS = 60 * MINUTES

DEFAULTS = {
    "APP_NAME": "neuronpedia-inference",
    "GPU": "A10",
    "CPU": "4",
    "MODEL_ID": "gpt2-small",
    "MIN_CONTAINERS": "0",
    "MAX_CONTAINERS": "4",
    "SCALEDOWN_WINDOW": str(5 * MINUTES),
    "MAX_INPUTS": "32",
    "TIMEOUT": str(20 * MINUTES),
    "STARTUP_TIMEOUT": str(30 * MINUTES),
    "CUSTOM_DOMAIN": "",
    "GPU_SNAPSHOT": "0",
    "MODELS": "",
    "PROXY_AUTH": "0",
    "TARGET_INPUTS": "",
    "BUFFER_CONTAINERS": "0",
    "RETRIES": "0",
    "MEMORY": "",
    "EPHEMERAL_DISK": "",
    "REGION": "",
    "CLOUD": "",
    "SECRET_NAME": "neuronpedia-inference",
    "VOLUME_NAME": "hf-cache-neuronpedia",
}

CARDS = {**GPUS, "A100": 40, "RTX-PRO-6000": 96, "H100!": 80, "B200+": 180}
"""GB of every type that may be asked for. `H100!` is never upgraded to an H200, `B200+` may be something newer."""
NO_GPU = ("none", "cpu")
EXAMPLES = {"REGION": "us-east or eu", "CLOUD": "aws, gcp or oci"}
SECRETS = ("SECRET", "SENTRY_DSN")
"""Settings that travel in the Modal secret only."""
OTHERS = frozenset({*DEFAULTS, "HF_TOKEN"})
"""Variables that mean something here, beside settings."""


@dataclass(frozen=True)
class Options:
    """One deployment."""

    app_name: str
    gpu: str | list[str] | None
    """As Modal takes it: None is a CPU container, a list is tried in order."""
    cpu: float
    """Cores asked for; tensors on the CPU use as many threads."""
    min_containers: int
    max_containers: int
    scaledown_window_s: int
    max_inputs: int
    """Requests that one container takes at a time."""
    timeout_s: int
    startup_timeout_s: int
    custom_domains: tuple[str, ...]
    gpu_snapshot: bool
    target_inputs: int
    """Requests for which the autoscaler makes room in each container, so that bursts find some left."""
    buffer_containers: int
    retries: int
    """Of an input whose container was lost or that failed, by Modal."""
    memory_gib: int | None
    """None: what the plan counts."""
    ephemeral_disk_gib: int | None
    """None: what the plan counts, where Modal's own is not enough."""
    region: tuple[str, ...]
    cloud: str | None
    models: tuple[str, ...]
    """What callers of `AnyModel` may choose beside the deployment's own; empty: SAELens's directory."""
    proxy_auth: bool
    """Modal itself asks web callers for a proxy token, before a container is started."""
    secret_name: str
    """Empty: no secret."""
    volume_name: str
    env: Mapping[str, str]
    """What the container's environment must hold for all this: these choices, and the library settings made."""

    @classmethod
    def read(cls) -> Options:
        """Raises StartupError, one line that names the variable."""
        chosen = {name: os.environ.get(name, default).strip() for name, default in DEFAULTS.items()}
        settings = _library_settings()
        options = cls(
            app_name=_app_name(chosen["APP_NAME"]),
            gpu=_gpu(chosen["GPU"]),
            cpu=_number("CPU", chosen["CPU"], 1, 64),
            min_containers=_number("MIN_CONTAINERS", chosen["MIN_CONTAINERS"], 0, 100),
            max_containers=_number("MAX_CONTAINERS", chosen["MAX_CONTAINERS"], 1, 1000),
            scaledown_window_s=_number("SCALEDOWN_WINDOW", chosen["SCALEDOWN_WINDOW"], 2, 3600),
            max_inputs=_number("MAX_INPUTS", chosen["MAX_INPUTS"], 2, 1000),
            timeout_s=_number("TIMEOUT", chosen["TIMEOUT"], 1, 24 * HOURS),
            startup_timeout_s=_number("STARTUP_TIMEOUT", chosen["STARTUP_TIMEOUT"], 1, 24 * HOURS),
            custom_domains=tuple(chosen["CUSTOM_DOMAIN"].replace(",", " ").split()),
            gpu_snapshot=_switch("GPU_SNAPSHOT", chosen["GPU_SNAPSHOT"]),
            target_inputs=_target(chosen["TARGET_INPUTS"], chosen["MAX_INPUTS"]),
            buffer_containers=_number("BUFFER_CONTAINERS", chosen["BUFFER_CONTAINERS"], 0, 100),
            retries=_number("RETRIES", chosen["RETRIES"], 0, 10),
            memory_gib=_size("MEMORY", chosen["MEMORY"], 1, 1024),
            ephemeral_disk_gib=_size("EPHEMERAL_DISK", chosen["EPHEMERAL_DISK"], 1, 3072),
            region=_words("REGION", chosen["REGION"]),
            cloud=next(iter(_words("CLOUD", chosen["CLOUD"])), None),
            models=_models(chosen["MODELS"]),
            proxy_auth=_switch("PROXY_AUTH", chosen["PROXY_AUTH"]),
            secret_name=_resource_name("SECRET_NAME", chosen["SECRET_NAME"]) if chosen["SECRET_NAME"] else "",
            volume_name=_resource_name("VOLUME_NAME", chosen["VOLUME_NAME"]),
            env={**chosen, **settings},
        )
        _check_together(options, settings)
        # One request more than are admitted would be refused, although Modal has room for it.
        return options._with_env(MAX_CONCURRENT_REQUESTS=str(max(32, options.max_inputs)), NUM_THREADS=chosen["CPU"])

    @classmethod
    def read_or_exit(cls) -> Options:
        """As `read`, but a mistake ends the process with its line: `modal deploy` would draw a page of traceback."""
        try:
            return cls.read()
        except StartupError as exc:
            raise SystemExit(f"Nothing was deployed. {exc}") from None

    def _with_env(self, **defaults: str) -> Options:
        return Options(**{**vars(self), "env": {**defaults, **self.env}})


def _library_settings() -> dict[str, str]:
    """The settings made in this shell, secrets left out, once the library has accepted them."""
    if Settings.read(_env_file=None).secrets_file is not None:
        raise StartupError(
            "SECRETS_FILE is a file of this machine, which no container has: unset it; SECRET goes there"
        )
    names = {variable(field) for field in Settings.model_fields} - {*SECRETS}
    return {name: os.environ[name] for name in sorted(names) if os.environ.get(name)}


def _app_name(name: str) -> str:
    # The name becomes part of the web address: "<name>-serve".
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,54}[a-z0-9])?", name) is None:
        raise StartupError(f"APP_NAME {name!r}: use up to 56 lower-case letters, digits and hyphens")
    return name


def _resource_name(name: str, text: str) -> str:
    # What becomes a name at Modal, which refuses others by a page of traceback.
    if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text) is None:
        raise StartupError(f"{name} {text!r}: use up to 64 letters, digits, hyphens, dots and underscores")
    return text


def _gpu(text: str) -> str | list[str] | None:
    if text.lower() in NO_GPU:
        return None
    wanted = [_one_gpu(part.strip()) for part in text.split(",")]
    return wanted if len(wanted) > 1 else wanted[0]


def _one_gpu(text: str) -> str:
    """`H100`, or `H100:1`."""
    name, colon, count = text.upper().partition(":")
    if name == "A10G":
        raise StartupError(f"GPU {text!r}: use A10")
    if name not in CARDS:
        raise StartupError(f"GPU: {unknown_name('type', text, CARDS)} `none` gives a container without a GPU.")
    if colon and not (count.isdecimal() and int(count) >= 1):
        raise StartupError(f"GPU {text!r}: after the colon comes a count, which can only be 1")
    if colon and int(count) > 1:
        raise StartupError(
            f"GPU {text!r}: a model is served by one GPU, and {int(count) - 1} would be paid for unused. "
            f"Use {name}, or a larger one: `neuronpedia-inference plan` names those that fit."
        )
    return name


def _models(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.replace(",", " ").split()))
    for name in names:
        if not is_name(name):
            raise StartupError(f"MODELS: {name!r} is not the name of a model; paths are not accepted")
    return names


def _target(text: str, max_inputs: str) -> int:
    """Three quarters of MAX_INPUTS where nothing is chosen."""
    most = _number("MAX_INPUTS", max_inputs, 2, 1000)
    return _number("TARGET_INPUTS", text, 1, most) if text else max(1, most * 3 // 4)


def _size(name: str, text: str, least: int, most: int) -> int | None:
    return _number(f"{name} (in GiB)", text, least, most) if text else None


def _words(name: str, text: str) -> tuple[str, ...]:
    words = tuple(text.replace(",", " ").split())
    if any(re.fullmatch(r"[a-z][a-z0-9-]*", word) is None for word in words):
        raise StartupError(f"{name} {text!r}: must be names such as {EXAMPLES[name]}")
    if name == "CLOUD" and len(words) > 1:
        raise StartupError(f"{name} {text!r}: only one can be chosen")
    return words


def _number(name: str, text: str, least: int, most: int) -> int:
    if not (text.isdecimal() and least <= int(text) <= most):
        why = ": with fewer, web app and methods do not share one event loop" if name == "MAX_INPUTS" else ""
        raise StartupError(f"{name} {text!r}: must be a whole number from {least} to {most}{why}")
    return int(text)


def _switch(name: str, text: str) -> bool:
    known: dict[str, Any] = {"1": True, "true": True, "yes": True, "": False, "0": False, "false": False, "no": False}
    if text.lower() not in known:
        raise StartupError(f"{name} {text!r}: must be 1 or 0")
    return known[text.lower()]


def _check_together(options: Options, settings: Mapping[str, str]) -> None:
    if options.min_containers > options.max_containers:
        raise StartupError(
            f"MIN_CONTAINERS ({options.min_containers}) is greater than MAX_CONTAINERS ({options.max_containers})"
        )
    admitted = settings.get("MAX_CONCURRENT_REQUESTS")
    if admitted is not None and int(admitted) < options.max_inputs:
        raise StartupError(
            f"MAX_INPUTS ({options.max_inputs}) is greater than MAX_CONCURRENT_REQUESTS ({admitted}): "
            "the rest would be refused"
        )
    if options.gpu_snapshot and not options.gpu:
        raise StartupError("GPU_SNAPSHOT: there is no GPU whose memory could be part of it (GPU=none)")
