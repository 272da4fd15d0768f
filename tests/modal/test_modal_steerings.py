"""The same steering through every method of the deployed class: what its `steer` does."""

from __future__ import annotations

import json
from typing import Any

from tests.modal.service_under_test import Deployed
from tests.steerings import check


def test_methods(deployed: Deployed) -> None:
    def ask(operation: str, body: dict[str, Any]) -> dict[str, Any]:
        return deployed.python(
            """
            method, body = getattr(Inference(), sys.argv[1]), json.loads(sys.argv[2])
            result = method.remote(body.pop("prompt"), **body) if sys.argv[1] == "steer" else method.remote(body)
            """,
            operation,
            json.dumps(body),
        )

    assert check(ask, at_an_address=False) == ["sweep", "capture", "score", "lens_prompt"]
