"""`neuronpedia-inference serve` whose engine dies at its first capture, as the first argument says."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch

from neuronpedia_inference import cli
from neuronpedia_inference.runtime import Runtime


class Killed(BaseException):
    """What no handler may swallow."""


DEATHS = {"device": torch.AcceleratorError("device-side assert triggered"), "worker": Killed("the worker is killed")}


def main(death: str) -> None:
    load = Runtime.load

    def capture(*_: Any) -> NoReturn:
        raise DEATHS[death]

    def doomed(*args: Any) -> Runtime:
        runtime = load(*args)
        runtime._worker._engine.capture = capture  # pyright: ignore[reportAttributeAccessIssue]
        return runtime

    Runtime.load = doomed  # pyright: ignore[reportAttributeAccessIssue]
    cli.main()


if __name__ == "__main__":
    main(sys.argv.pop(1))
