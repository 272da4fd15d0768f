"""A real server at its memory limit: what does not fit is refused as that, and answered once there is room again."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import httpx
import psutil
import pytest
from commands import command, line_with

from neuronpedia_inference.settings import EMBEDDED_MODEL_ID

N_WORDS = 1500
SPARE_BYTES = 2**22
"""Beyond what is mapped already. The request's neurons alone take twice that: 1,500 × 1,536 × 4 bytes."""
WANTED = {"prompts": ["cat " * N_WORDS], "model": EMBEDDED_MODEL_ID, "source": "15"}


@pytest.fixture
def server() -> Iterator[tuple[psutil.Process, httpx.Client]]:
    options = ["serve", "--port", "0", "--sae-sets", "[]"]
    with command(options, TOKEN_LIMIT="2000", MAX_RESULT_VALUES="5000000", REQUEST_MEMORY_GIB="8") as process:
        url = line_with(process, "Listening on").split()[-1]
        line_with(process, "Ready in")
        with httpx.Client(base_url=url, timeout=300) as http:
            yield psutil.Process(process.pid), http


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="limits of other processes are Linux's")
def test_want_of_memory_ends_requests_and_not_the_server(server: tuple[psutil.Process, httpx.Client]) -> None:
    process, http = server
    # A tokenizer's own code, which is Rust, ends the process where it is denied memory: what it takes is mapped now.
    assert http.post("/v1/tokenize", json={"text": WANTED["prompts"][0], "model": EMBEDDED_MODEL_ID}).is_success
    small = {**WANTED, "prompts": ["cat"]}
    assert http.post("/v1/activation/source", json=small).status_code == 200
    process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms + SPARE_BYTES, resource.RLIM_INFINITY))
    for _ in range(3):
        answer = http.post("/v1/activation/source", json=WANTED)
        assert (answer.status_code, answer.json()["code"]) == (503, "out_of_memory")
        assert http.get("/ready").json() == {"status": "ready", "model": EMBEDDED_MODEL_ID}

    process.rlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer = http.post("/v1/activation/source", json=WANTED)
    assert answer.status_code == 200
    assert len(answer.json()["results"][0]["tokens"]) > N_WORDS
