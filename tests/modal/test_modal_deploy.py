"""`modal deploy`: what is created, what it is made of, and mistakes that must stop it before anything is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.operations import OPERATIONS
from service.image import EMBEDDED_WEIGHTS, requirements
from service.options import CARDS, DEFAULTS, Options
from tests.modal.local_modal import Plane
from tests.modal.service_under_test import APP, ROOT, VOLUME, Deployed

SECRET = "neuronpedia-inference"


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Deployed with nothing chosen. Only looked at."""
    folder = tmp_path_factory.mktemp("defaults")
    with Plane(folder / "plane") as plane:
        service = Deployed(plane, folder)
        service.deploy()
        yield service


def test_without_a_secret_it_deploys_and_says_that_it_is_open(fresh: Deployed) -> None:
    said = fresh.deploy().text

    assert said.count("OPEN to everybody") == 1
    made = fresh.function()
    assert made.gpus == ("A10:1",)
    assert not made.definition.secret_ids
    (mount,) = made.definition.volume_mounts
    assert (mount.mount_path, fresh.plane.objects.volumes[mount.volume_id].name) == ("/cache", VOLUME)
    assert made.definition.checkpointing_enabled
    web = made.definition.method_definitions["serve"].webhook_config
    assert (web.requested_suffix, web.requires_proxy_auth) == (f"{APP}-serve", False)
    env = _env_of(fresh)
    assert env["MODEL_ID"] == "gpt2-small"
    assert env["SECRET_NAME"] == ""
    assert "TOKEN_LIMIT" not in env


def test_with_a_secret_and_everything_chosen(fresh: Deployed) -> None:
    assert fresh.modal("secret", "create", SECRET, "SECRET=x", "HF_TOKEN=y").code == 0
    said = fresh.modal(
        "deploy",
        "-m",
        "service.inference_cls",
        APP_NAME="other",
        GPU="l40s, H100",
        MIN_CONTAINERS="1",
        MAX_CONTAINERS="3",
        SCALEDOWN_WINDOW="77",
        MAX_INPUTS="48",
        TARGET_INPUTS="40",
        BUFFER_CONTAINERS="2",
        RETRIES="1",
        MEMORY="24",
        EPHEMERAL_DISK="600",
        REGION="us-east, eu-west",
        CLOUD="gcp",
        TIMEOUT="90",
        STARTUP_TIMEOUT="600",
        CUSTOM_DOMAIN="features.example.org",
        GPU_SNAPSHOT="1",
        MODELS="gemma-2-2b, google/gemma-2-9b",
        PROXY_AUTH="1",
        TOKEN_LIMIT="321",
        SAE_SETS='["res-jb"]',
        SECRET="not carried",
    )

    assert said.code == 0, said.text
    assert "OPEN to everybody" not in said.text
    made = fresh.function(app="other")
    definition = made.definition
    assert made.gpus == ("L40S:1", "H100:1")
    assert definition.autoscaler_settings.min_containers == 1
    assert definition.autoscaler_settings.max_containers == 3
    assert definition.autoscaler_settings.scaledown_window == 77
    assert definition.autoscaler_settings.buffer_containers == 2
    assert (definition.max_concurrent_inputs, definition.target_concurrent_inputs) == (48, 40)
    assert definition.retry_policy.retries == 1
    assert (definition.resources.memory_mb, definition.resources.ephemeral_disk_mb) == (24 * 1024, 600 * 1024)
    assert list(definition.scheduler_placement.regions) == ["us-east", "eu-west"]
    assert definition.cloud_provider_str == "gcp"
    assert (definition.timeout_secs, definition.startup_timeout_secs) == (90, 600)
    assert dict(definition.experimental_options) == {"enable_gpu_snapshot": "True"}
    (secret_id,) = definition.secret_ids
    assert fresh.plane.objects.secrets[secret_id].name == SECRET
    web = definition.method_definitions["serve"].webhook_config
    assert web.requested_suffix == "other-serve"
    assert web.requires_proxy_auth
    assert [domain.name for domain in web.custom_domains] == ["features.example.org"]
    env = _env_of(fresh, "other")
    assert (env["TOKEN_LIMIT"], env["SAE_SETS"], env["SECRET_NAME"]) == ("321", '["res-jb"]', SECRET)
    assert "SECRET" not in env
    assert env["MAX_CONCURRENT_REQUESTS"] == "48"
    assert env["MODELS"] == "gemma-2-2b, google/gemma-2-9b"
    any_model = fresh.function("AnyModel.*", app="other").definition
    assert not any_model.autoscaler_settings.min_containers
    assert not any(method.webhook_config.type for method in any_model.method_definitions.values())


def test_deploying_again_updates_the_same_app(fresh: Deployed) -> None:
    fresh.deploy(GPU="T4")
    before = fresh.plane.objects.app(APP).id
    fresh.deploy(GPU="H200")

    assert fresh.plane.objects.app(APP).id == before
    assert fresh.function().gpus == ("H200:1",)


@pytest.mark.parametrize("chosen", [{"GPU": "A10G"}, {"TOKEN_LIMIT": "-1"}])
def test_a_mistake_stops_the_command_with_one_line(fresh: Deployed, chosen: dict[str, str]) -> None:
    said = fresh.modal("deploy", "service/inference_cls.py", **chosen)

    assert said.code != 0
    (line,) = said.text.strip().splitlines()
    assert next(iter(chosen)) in line
    assert fresh.plane.objects.n_requests_that_create == 0


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("GPU", "A10G", "use A10"),
        ("GPU", "A1000", "Did you mean 'A100'"),
        ("GPU", "H100:2", "1 would be paid for unused. Use H100, or a larger one"),
        ("GPU", "L4,H100:8", "7 would be paid for unused"),
        ("GPU", "H100:x", "count"),
        ("GPU", "H100+", "Unknown type"),
        ("GPU", "T4,", "Unknown type ''"),
        ("APP_NAME", "My App", "lower-case"),
        ("CPU", "0", "from 1 to 64"),
        ("MIN_CONTAINERS", "9", "greater than MAX_CONTAINERS"),
        ("MAX_CONTAINERS", "many", "whole number"),
        ("SCALEDOWN_WINDOW", "1", "from 2 to 3600"),
        ("MAX_INPUTS", "1", "event loop"),
        ("MAX_CONCURRENT_REQUESTS", "8", "MAX_INPUTS"),
        ("TIMEOUT", "-5", "whole number"),
        ("STARTUP_TIMEOUT", "", "whole number"),
        ("GPU_SNAPSHOT", "maybe", "1 or 0"),
        ("PROXY_AUTH", "on", "1 or 0"),
        ("MODELS", "gpt2-small /etc/passwd", "paths are not accepted"),
        ("TARGET_INPUTS", "33", "from 1 to 32"),
        ("BUFFER_CONTAINERS", "-1", "whole number"),
        ("RETRIES", "11", "from 0 to 10"),
        ("MEMORY", "4GB", "in GiB"),
        ("EPHEMERAL_DISK", "0", "in GiB"),
        ("REGION", "US East", "us-east"),
        ("CLOUD", "aws gcp", "only one"),
        ("VOLUME_NAME", "my volume", "letters, digits"),
        ("VOLUME_NAME", "", "letters, digits"),
        ("SECRET_NAME", "a/b", "letters, digits"),
        ("MODELS", "../x", "paths are not accepted"),
        ("MODEL_DTYPE", "int4", "float32"),
        ("INCLUDE_SAE", "[", "regular expression"),
        ("MAX_LOADED_SAES", "0", "greater than or equal to 1"),
    ],
)
def test_mistakes_name_the_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError) as raised:
        Options.read()
    text = str(raised.value)
    assert name in text
    assert why in text
    assert "\n" not in text


def test_a_snapshot_of_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_SNAPSHOT", "1")
    monkeypatch.setenv("GPU", "none")
    with pytest.raises(StartupError, match="GPU_SNAPSHOT"):
        Options.read()


def test_room_is_left_in_every_container(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, target in (("32", 24), ("2", 1), ("1000", 750)):
        monkeypatch.setenv("MAX_INPUTS", most)
        assert Options.read().target_inputs == target


@pytest.mark.parametrize("gpu", [*CARDS, "h100"])
def test_every_gpu_is_accepted(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    monkeypatch.setenv("GPU", gpu)
    assert Options.read().gpu == gpu.upper()
    monkeypatch.setenv("GPU", f"{gpu}:1")
    assert Options.read().gpu == gpu.upper()


def test_the_environment_reads_back_as_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container decides again, from the environment that its deployment gave it."""
    for name, value in {"GPU": "L4,A10", "MAX_INPUTS": "64", "TOKEN_LIMIT": "99", "CPU": "2"}.items():
        monkeypatch.setenv(name, value)
    options = Options.read()
    for name, value in options.env.items():
        monkeypatch.setenv(name, value)
    assert Options.read() == options


def test_the_image_installs_what_pip_can_resolve(defaults: Deployed) -> None:
    """Its own pip commands, tried against the packages installed here, which constraints.txt lists."""
    commands = [line for line in _commands_of(defaults) if line.startswith("RUN python -m pip install")]
    assert len(commands) == 2
    for line in commands:
        wanted = shlex.split(line.removeprefix("RUN python -m pip install"))
        wanted = [word.replace("/constraints.txt", str(ROOT / "constraints.txt")) for word in wanted]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *wanted],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Would install" not in done.stdout


def test_the_image_is_pinned_by_what_it_installs_alone() -> None:
    """An edit of a development package's pin must not rebuild it."""
    pinned = {canonicalize_name(line.partition("==")[0]) for line in _pins("constraints.txt")}
    needed = {canonicalize_name(EMBEDDED_WEIGHTS.partition("==")[0])} | _closure(requirements())
    assert pinned == needed - {"setuptools"}
    for file in ("constraints.txt", "constraints-dev.txt"):
        wrong = [line for line in _pins(file) if metadata.version(line.split("==")[0]) != line.split("==")[1]]
        assert [line for line in wrong if not line.startswith("torch==")] == []


def _pins(file: str) -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _closure(texts: list[str]) -> set[str]:
    """Names of these distributions and of all that they need here."""
    waiting, seen = [Requirement(text) for text in texts], set()
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(wanted.name) or []:
            below = Requirement(text)
            if not below.marker or any(below.marker.evaluate({"extra": one}) for one in wanted.extras or {""}):
                waiting.append(below)
    return {name for name, _ in seen}


def test_the_image_ships_every_file_of_the_library(defaults: Deployed) -> None:
    shipped = defaults.plane.store.root_of(defaults.function().definition.mount_ids)
    for package in ("neuronpedia_inference", "service"):
        assert _files(shipped / package) == _files(ROOT / package)
    assert {path.name for path in shipped.iterdir()} == {"neuronpedia_inference", "service", "inference_cls.py"}


def test_importing_it_does_not_import_torch() -> None:
    program = "import sys, service.inference_cls; assert not {'torch', 'transformers', 'sae_lens'} & set(sys.modules)"
    env = {"PATH": "/usr/bin:/bin", "MODAL_CONFIG_PATH": "/nowhere"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_class_has_a_method_for_every_operation(defaults: Deployed) -> None:
    methods = set(defaults.function().definition.method_definitions)
    assert methods - {"steer_stream", "lens_prompt_stream", "answer_many", "capabilities", "serve"} == {
        operation.name for operation in OPERATIONS if not operation.off_modal_because
    }


def _env_of(deployed: Deployed, app: str = APP) -> dict[str, str]:
    pairs = [shlex.split(line[4:])[0] for line in _commands_of(deployed, app) if line.startswith("ENV ")]
    return dict(pair.split("=", 1) for pair in pairs)


def _commands_of(deployed: Deployed, app: str = APP) -> list[str]:
    return list(deployed.plane.objects.commands_of(deployed.function(app=app).definition.image_id))


def _files(folder: Path) -> set[str]:
    hidden = re.compile(r"(^|/)(\.|__pycache__)")
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if not hidden.search(path)}


def test_defaults_are_those_of_the_guide() -> None:
    assert (DEFAULTS["MODEL_ID"], DEFAULTS["GPU"]) == ("gpt2-small", "A10")
    assert (DEFAULTS["APP_NAME"], DEFAULTS["SECRET_NAME"]) == (APP, SECRET)
    assert DEFAULTS["VOLUME_NAME"] == VOLUME
