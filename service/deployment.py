"""What `modal deploy` is about to put online: counted, checked and told. Runs on the deploying machine only."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.memory import GIB, Needs, needs_at_start, planned
from neuronpedia_inference.prices import price_of
from neuronpedia_inference.saes.catalogue import resolve
from neuronpedia_inference.saes.names import hugging_face_name
from neuronpedia_inference.settings import Settings, near_misses
from service.options import CARDS, DEFAULTS, OTHERS, Options

HOST_BYTES = 3 * GIB
"""A rule of thumb: Python, torch and what requests take, beside weights and SAEs."""
MODAL_DISK_BYTES = 512 * GIB
"""What a container has without asking."""


@dataclass(frozen=True)
class Plan:
    """Memory and disk that the deployment's model takes, as far as they can be counted here."""

    model: str
    sources: tuple[str, ...]
    needs: Needs | None
    not_counted: str
    """Why `needs` is None."""

    @property
    def memory_mib(self) -> int | None:
        """Of the container: the weights pass through it, and SAEs are kept in it."""
        if self.needs is None:
            return None
        return (self.needs.weights + self.needs.saes + HOST_BYTES) // 2**20

    @property
    def disk_mib(self) -> int | None:
        """None: what Modal gives without asking is enough."""
        if self.needs is None:
            return None
        files = self.needs.weights + self.needs.saes
        return files // 2**20 if files > MODAL_DISK_BYTES else None


# Checks before anything is created


def plan_of(options: Options) -> Plan:
    """Raises StartupError for a model or source set that exists nowhere, or that no GPU chosen can hold."""
    settings = Settings.read(_env_file=None, model_id=options.env["MODEL_ID"])
    model = settings.weights_id
    in_container = [str(path) for path in (model, settings.local_sae_dir or "") if str(path).startswith("/")]
    if in_container:
        return Plan(model, (), None, f"{in_container[0]} is in the container")
    sources = tuple(spec.name for spec in resolve(settings).specs)
    try:
        needs = planned(settings)
    except StartupError as exc:
        _check_known(model)
        return Plan(model, sources, None, str(exc))
    least = needs_at_start(settings)
    for gpu in cards(options):
        if least is not None and least.total - least.headroom > CARDS[gpu] * 10**9:
            fits = f"GPU={least.gpu} has the memory" if least.gpu else "no single GPU of Modal has the memory"
            gib = (least.total - least.headroom) / GIB
            raise StartupError(f"GPU {gpu}: {model} needs {gib:.1f} GiB without its SAEs; {fits}")
    return Plan(model, sources, needs, "")


def _check_known(model: str) -> None:
    """Raises StartupError if the hub says that it has no such model; a hub that cannot be asked says nothing."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repo = hugging_face_name(model)
    try:
        HfApi().model_info(repo)
    except GatedRepoError:
        return
    except RepositoryNotFoundError:
        raise StartupError(
            f"MODEL_ID {model!r}: neither SAELens's directory nor the hub has it. For a private model set HF_TOKEN in "
            "this shell, and in the Modal secret"
        ) from None
    except (OSError, ValueError, HTTPError):
        return


def check_name(options: Options, given: str) -> None:
    """Raises StartupError for a `modal deploy --name` that parts the app's name from its address."""
    if given and given != options.app_name:
        raise StartupError(
            f"--name {given}: the app is named by APP_NAME, which its web address follows: "
            f"APP_NAME={given} modal deploy service/inference_cls.py"
        )


def cards(options: Options) -> list[str]:
    """Every GPU that a container may get."""
    return [options.gpu] if isinstance(options.gpu, str) else list(options.gpu or ())


# What is told


def left_behind(secret_name: str, keys: Collection[str] | None) -> Iterator[str]:
    """A line for each secret that is in the shell and not in the Modal secret; keys: None where there is none."""
    for name in ("SECRET", "HF_TOKEN", "SENTRY_DSN"):
        if os.environ.get(name) and name not in (keys or ()):
            where = f"the Modal secret {secret_name!r}" if keys is not None else "a Modal secret"
            yield f"{name} is set in this shell and not in {where}: containers do not see the shell"


def summary(options: Options, plan: Plan, *, keys: Collection[str] | None, address: str) -> str:
    """What is online now, what it costs, who can reach it, and what to type next."""
    rows = [
        ("model", _model(plan)),
        ("GPU", _gpus(options)),
        ("memory", _memory(options, plan)),
        ("access", _access(options, keys)),
        ("AnyModel", f"methods only: {', '.join(options.models) or 'every model of the directory of SAELens'}"),
        ("address", address),
    ]
    lines = [f"{options.app_name} is online.", *(f"  {name:9} {text}" for name, text in rows), "Next:"]
    return "\n".join([*lines, f"  curl {address}/ready{_header(options)}", f"  modal app logs {options.app_name} -f"])


def _model(plan: Plan) -> str:
    sets = ", ".join(dict.fromkeys(name.split("-", 1)[1] for name in plan.sources))
    return f"{plan.model}, {len(plan.sources)} SAEs ({sets})" if plan.sources else f"{plan.model}, no SAEs counted"


def _gpus(options: Options) -> str:
    if not cards(options):
        return f"none; {options.cpu:g} CPU cores"
    priced = []
    for gpu in cards(options):
        price = price_of(gpu)
        cost = f"{price.usd_per_hour:.2f} dollars an hour (seen {price.seen})" if price else "price not known"
        priced.append(f"{gpu}, {CARDS[gpu]} GB, {cost}")
    paid = (
        "at all hours" if options.min_containers else f"from a start to {options.scaledown_window_s} s after the last"
    )
    return f"{'; else '.join(priced)}; paid {paid}{'' if options.min_containers else ' request'}"


def _memory(options: Options, plan: Plan) -> str:
    if plan.needs is None:
        return f"not counted: {plan.not_counted}"
    needs = plan.needs
    parts = (("weights", needs.weights), ("SAEs", needs.saes), ("cache", needs.cache), ("headroom", needs.headroom))
    counted = ", ".join(f"{name} {part / GIB:.1f}" for name, part in parts)
    if not cards(options):
        return f"{needs.total / GIB:.1f} GiB needed ({counted})"
    have = min(CARDS[gpu] for gpu in cards(options)) * 10**9
    short = "" if needs.total <= have else "; not all at once: SAEs take turns, and fewer completions run together"
    return f"{needs.total / GIB:.1f} GiB needed ({counted}), {have / GIB:.1f} had{short}"


def _access(options: Options, keys: Collection[str] | None) -> str:
    guards = ["a proxy token of the workspace"] if options.proxy_auth else []
    guards += ["the header X-SECRET-KEY"] if "SECRET" in (keys or ()) else []
    if guards:
        return f"guarded: callers need {' and '.join(guards)}"
    return (
        "OPEN to everybody who knows the address, at your expense. To guard it: "
        f"modal secret create {options.secret_name or DEFAULTS['SECRET_NAME']} SECRET=... HF_TOKEN=... and deploy again"
    )


def _header(options: Options) -> str:
    """For /ready, which asks for no key of ours."""
    return ' -H "Modal-Key: $TOKEN_ID" -H "Modal-Secret: $TOKEN_SECRET"' if options.proxy_auth else ""


# For the service's module


def prepare(options: Options, keys: Collection[str] | None) -> Plan | None:
    """Check what `modal deploy` was asked for and say what looks wrong. None for other commands, and in containers.

    keys: of the Modal secret, None where there is none. A mistake ends the process with its line.
    """
    context = click.get_current_context(silent=True)
    if context is None or context.info_name != "deploy":
        return None
    try:
        check_name(options, context.params.get("name") or "")
        plan = plan_of(options)
    except StartupError as exc:
        raise SystemExit(f"Nothing was deployed. {exc}") from None
    for line in (*near_misses(os.environ, OTHERS), *left_behind(options.secret_name, keys)):
        click.echo(f"Note: {line}", err=True)
    return plan


def tell_when_done(tell: Callable[[], str]) -> None:
    """Have the text told when the `modal` command has done its work, and nothing if it fails."""

    @contextmanager
    def told() -> Iterator[None]:
        yield
        click.echo(tell())

    click.get_current_context().with_resource(told())


def requested(options: Options, plan: Plan | None) -> dict[str, Any]:
    """`memory` and `ephemeral_disk` in MiB for Modal: as chosen, else as counted."""
    memory = options.memory_gib * 1024 if options.memory_gib else plan and plan.memory_mib
    disk = options.ephemeral_disk_gib * 1024 if options.ephemeral_disk_gib else plan and plan.disk_mib
    return {"memory": memory, "ephemeral_disk": disk}
