"""A steered text as it is written, over HTTP. Needs a running server and `pip install httpx`.

    python examples/steer_stream.py [http://127.0.0.1:5002]

The secret, if the server has one, comes from the environment: SECRET=... python examples/steer_stream.py
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import httpx

REQUEST = {
    "prompt": "The most important thing is",
    "features": [{"source": "15-res-4k", "index": 1113, "strength": 70}],
    "max_new_tokens": 12,
    "stream": True,
}


def events(url: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every event holds the whole answer so far; one with `error` is the last."""
    headers = {"X-SECRET-KEY": os.environ["SECRET"]} if os.environ.get("SECRET") else {}
    with httpx.stream("POST", f"{url}/v1/steer", json=request, headers=headers, timeout=60) as response:
        if response.is_error:
            response.read()
            raise SystemExit(response.json()["error"])
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def main(url: str) -> None:
    shown = ""
    print(REQUEST["prompt"], end="")
    for event in events(url, REQUEST):
        if "error" in event:
            raise SystemExit(event["error"])
        text = event["steered"]["text"]
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:5002")
