"""Files of a batch job, and a service that is a plain function."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from service import batch

N_LINES = 200
BAD = {17: '{"prompt": 5}', 90: "{not json", 151: '{"source": "1"}'}


def write_lines(path: Path, n: int = N_LINES, bad: dict[int, str] = BAD) -> Path:
    good = (json.dumps({"prompt": f"Number {i}."}) for i in range(1, n + 1))
    path.write_text("".join(f"{bad.get(i, text)}\n" for i, text in enumerate(good, 1)), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


class Service:
    """Answers each body with itself; `faults` gives errors for a prompt, one per attempt."""

    def __init__(self, **faults: list[Exception]) -> None:
        self.calls: list[list[str]] = []
        self.faults = {f"Number {name[1:]}.": list(errors) for name, errors in faults.items()}
        self.under_way = self.most_under_way = 0

    @property
    def sent(self) -> list[str]:
        return [prompt for call in self.calls for prompt in call]

    async def ask(self, name: str, bodies: list[dict[str, Any]]) -> list[Any]:
        assert name == "activations"
        self.calls.append([body["prompt"] for body in bodies])
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        return [self._outcome(body) for body in bodies]

    def _outcome(self, body: dict[str, Any]) -> Any:
        faults = self.faults.get(body["prompt"])
        return faults.pop(0) if faults else {"echo": body}


def run(tmp_path: Path, service: Service, fields: str = "") -> batch.Counts:
    files = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    return asyncio.run(batch.run(*files, "activations", fields, service.ask, pause_s=0))
