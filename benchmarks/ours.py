"""This project in process: `operations.answer` on one `Runtime`. `python -m benchmarks.ours`."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.child import Run, serve
from benchmarks.wire import ask_all, read, requests_of
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings


class InProcess:
    packages = ("neuronpedia-inference", "torch", "transformers")

    def __init__(self) -> None:
        self._runtime = Runtime.load(Settings.read())
        self._loop = asyncio.new_event_loop()

    def prepare(self, line: dict[str, Any]) -> Run:
        operation, bodies = requests_of(line)

        def run() -> list[Any]:
            asked = ask_all(self._ask, operation, bodies, line["at_a_time"])
            return read(operation, self._loop.run_until_complete(asked))

        return run

    async def _ask(self, operation: str, body: dict[str, Any]) -> Any:
        return await answer(by_name[operation], body, self._runtime)


if __name__ == "__main__":
    serve(InProcess)
