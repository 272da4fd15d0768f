"""Commands about steering vectors in files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neuronpedia_inference.cli.output import line, table
from neuronpedia_inference.errors import InvalidRequest

vectors = typer.Typer(
    no_args_is_help=True, help="Control vectors (GGUF, as repeng and llama.cpp have them) and steerings."
)
FileArgument = Annotated[Path, typer.Argument(help="A GGUF file with a control vector.")]


@vectors.command("import")
def import_(
    file: FileArgument,
    to: Annotated[Path | None, typer.Option(help="Where to write the steering; without it, it is printed.")] = None,
    strength: Annotated[float, typer.Option(help="What every direction is multiplied by.")] = 1.0,
) -> None:
    """Write a control vector as JSON: the fields that a request to `steer` has for it.

    llama.cpp adds direction N behind block N, and so does the steering. In Python, `ni.ControlVector.read(file) @ 1.5`.
    """
    from neuronpedia_inference.client.control_vectors import ControlVector

    try:
        read = ControlVector.read(file)
    except (ValueError, OSError) as exc:
        raise InvalidRequest(str(exc)) from None
    steering = (read @ strength).to_json()
    if to is None:
        line(steering)
        return
    to.write_text(steering + "\n", encoding="utf-8")
    rows = [
        (f"blocks.{layer}.hook_resid_post", str(len(one)), f"{float((one.astype(float) ** 2).sum()) ** 0.5:.4g}")
        for layer, one in read.directions.items()
    ]
    table(("hook", "width", "norm"), rows)


@vectors.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="A steering as JSON, as `import` and `Steering.to_json` write it.")],
    to: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    model_hint: Annotated[str, typer.Option(help="The kind of model, as llama.cpp calls it, such as llama.")] = "",
) -> None:
    """Write a steering that adds vectors behind blocks as a control vector, which llama.cpp reads."""
    from neuronpedia_inference.client.control_vectors import ControlVector
    from neuronpedia_inference.client.steering import Steering

    try:
        steering = Steering.from_json(file.read_text(encoding="utf-8"))
        ControlVector.of(steering, model_hint=model_hint).save(to)
    except (ValueError, KeyError, TypeError, OSError) as exc:
        raise InvalidRequest(f"{file}: {exc}") from None
