"""`neuronpedia-inference serve` whose engine dies at its first capture, as the first argument says.

The second is for how many seconds it says so.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch

from neuronpedia_inference import cli
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web import serve


class Killed(BaseException):
    """What no handler may swallow."""


DEATHS = {"device": torch.AcceleratorError("device-side assert triggered"), "worker": Killed("the worker is killed")}


def main(death: str, farewell_s: float) -> None:
    serve.FAREWELL_S = farewell_s
    load = Runtime.load

    def capture(*_: Any) -> NoReturn:
        raise DEATHS[death]

    def doomed(*args: Any) -> Runtime:
        runtime = load(*args)
        runtime._worker._engine.begin_capture = capture  # pyright: ignore[reportAttributeAccessIssue]
        return runtime

    Runtime.load = doomed  # pyright: ignore[reportAttributeAccessIssue]
    cli.main()


if __name__ == "__main__":
    main(sys.argv.pop(1), float(sys.argv.pop(1)))
