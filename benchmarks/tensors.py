"""What a large answer costs: every layer of 500 tokens as a file of tensors, beside copying its bytes over a socket.

`python -m benchmarks.tensors` prints the numbers and writes `benchmarks/results/tensors.json`. The server is in this
process, its reader in another. Counted from the end of the forward pass to the last byte; the bytes alone are sent in
pieces of the same size by a thread that has nothing else to do. They take turns.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.machine import Load, description
from neuronpedia_inference.operations.tensors import PIECE_BYTES
from neuronpedia_inference.questions.states import States
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web.app import create_app

RESULTS = Path(__file__).parent / "results" / "tensors.json"
N_TOKENS, N_ROUNDS = 500, 9


class Timed:
    """When the last forward pass ended: `States` is reduced right behind it."""

    def __init__(self) -> None:
        self.ended = 0.0
        reduce = States.reduce

        def timed(question: States, *args: Any) -> Any:
            self.ended = time.monotonic()
            return reduce(question, *args)

        setattr(States, "reduce", timed)  # noqa: B010  (a method of a frozen class)


def asked(port: int, body: dict[str, Any]) -> tuple[float, int]:
    """When the last byte of an answer came, and how many came; read as plainly as the bytes alone are."""
    content = json.dumps(body).encode()
    head = f"POST /v1/capture HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        first = connection.recv(PIECE_BYTES)
        assert first.startswith(b"HTTP/1.1 200"), first[:2000]
        return _rest(connection, len(first))


def copied(port: int) -> tuple[float, int]:
    """The same for what a plain socket sends."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        return _rest(connection, 0)


def _rest(connection: socket.socket, n_bytes: int) -> tuple[float, int]:
    while chunk := connection.recv(PIECE_BYTES):
        n_bytes += len(chunk)
    return time.monotonic(), n_bytes


@contextmanager
def serving(runtime: Runtime) -> Iterator[int]:
    """The port that it is served on."""
    config = uvicorn.Config(create_app(runtime.settings, lambda: runtime), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def send(listener: socket.socket, content: bytes, began: list[float]) -> None:
    connection, _ = listener.accept()
    with connection:
        began.append(time.monotonic())
        view = memoryview(content)
        for first in range(0, len(view), PIECE_BYTES):
            connection.sendall(view[first : first + PIECE_BYTES])


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    timed, load = Timed(), Load()
    runtime = Runtime.load(Settings.read(token_limit=600, max_tokens=1200, sae_sets=[], num_threads=1), print)
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(runtime.model.n_layers)]
    told: dict[str, list[float]] = {"answered_s": [], "copied_s": [], "peak_over_answer": []}
    listener = socket.create_server(("127.0.0.1", 0))
    n_bytes = 0
    with serving(runtime) as port, multiprocessing.get_context("spawn").Pool(1) as pool:
        for number in range(N_ROUNDS + 1):
            text = "".join(f" {(number + place) % 97}" for place in range(N_TOKENS // 3))[: 4 * N_TOKENS]
            body = {"prompt": text, "points": points, "format": "safetensors"}
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            last, n_bytes = pool.apply(asked, (port, body))
            peak, content, began = resident("VmHWM") - before, bytes(n_bytes), []
            sending = threading.Thread(target=send, args=(listener, content, began))
            sending.start()
            copied_at, _ = pool.apply(copied, (listener.getsockname()[1],))
            sending.join()
            if number:  # the first is to warm up
                told["answered_s"].append(last - timed.ended)
                told["copied_s"].append(copied_at - began[0])
                told["peak_over_answer"].append(peak / n_bytes)
    runtime.close()
    ratios = [a / b for a, b in zip(told["answered_s"], told["copied_s"], strict=True)]
    result = {
        "machine": {**description(), **load.since()},
        "bytes": n_bytes,
        "layers": len(points),
        **{name: round(statistics.median(values), 4) for name, values in told.items()},
        "answered_over_copied": round(statistics.median(ratios), 3),
        "peak_over_answer_at_most": round(max(told["peak_over_answer"]), 3),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
