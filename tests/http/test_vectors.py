"""Vectors as base64 and by digest, over a real port and through the client, against the same numbers as a list."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save
from served import MODEL, SOURCE, TEXT, WIDTH, Serve, Served, Wrapped, small_settings

import neuronpedia_inference as ni
from neuronpedia_inference.kept_vectors import KeptVectors
from neuronpedia_inference.operations import by_name
from neuronpedia_inference.runtime import Runtime

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HOOK = "blocks.15.hook_resid_post"
SAFETENSORS = {"Content-Type": "application/x-safetensors"}
NUMBERS = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) / 4
UNKNOWN = "vec:sha256:" + "0" * 64
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def as_base64(dtype: str, numbers: torch.Tensor = NUMBERS) -> str:
    raw = numbers.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes()
    return f"base64:{dtype}:{base64.b64encode(raw).decode()}"


def put(http: httpx.Client, *vectors: Any) -> httpx.Response:
    return http.put("/v1/vectors", json={"vectors": [{"name": str(n), "vector": one} for n, one in enumerate(vectors)]})


def steered(http: httpx.Client, vector: Any, strength: float = 12) -> list[Any]:
    """Tokens with their log-probabilities."""
    steering = [{"vector": vector, "strength": strength, "hook": HOOK}]
    body = {"prompt": TEXT, "vectors": steering, "max_new_tokens": 5, "compare": False, "n_logprobs": 2}
    answer = http.post("/v1/steer", json={**body, "reproducible": True})
    assert answer.status_code == 200, answer.text
    return answer.json()["steered"]["logprobs"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_digests_steer_as_the_numbers_do(http: httpx.Client, dtype: str) -> None:
    numbers = NUMBERS.to(DTYPES[dtype]).float()
    expected = steered(http, numbers.tolist())
    assert steered(http, as_base64(dtype)) == expected
    digest = put(http, as_base64(dtype)).json()["digests"]["0"]
    assert digest == "vec:sha256:" + hashlib.sha256(numbers.numpy().astype("<f4").tobytes()).hexdigest()
    assert steered(http, digest) == expected
    assert steered(http, digest, strength=0) != expected  # it is the vector that steers


def test_every_place_that_takes_a_vector_takes_its_digest(http: httpx.Client) -> None:
    [digest] = put(http, NUMBERS.tolist()).json()["digests"].values()
    edit = {"do": "swap", "hook": HOOK}
    completion = {"steer_method": "SIMPLE_ADDITIVE", "normalize_steering": False, "types": ["STEERED"]}
    completion |= {"strength_multiplier": 1, "temperature": 0, "freq_penalty": 0, "seed": 0, "n_completion_tokens": 3}
    turned = NUMBERS.roll(1).tolist()

    def bodies(vector: Any) -> dict[str, dict[str, Any]]:
        wire = {"steering_vector": vector, "strength": 20, "hook": HOOK}
        return {
            "/v1/activation/single": {"prompt": TEXT, "vector": vector, "hook": HOOK},
            "/v1/util/sae-topk-by-decoder-cossim": {"vector": vector, "source": SOURCE, "num_results": 3},
            "/v1/steer/completion": {"prompt": TEXT, "vectors": [wire], **completion},
            "/v1/steer": {
                "prompt": TEXT,
                "edits": [{**edit, "vector": vector, "with": turned}, {**edit, "vector": turned, "with": vector}],
                "max_new_tokens": 3,
            },
        }

    kept, listed, unknown = (bodies(one) for one in (digest, NUMBERS.tolist(), UNKNOWN))
    for path, body in kept.items():
        answer = http.post(path, json={"model": MODEL, **body})
        assert answer.status_code == 200, answer.text
        assert answer.json() == http.post(path, json={"model": MODEL, **listed[path]}).json()
        refused = http.post(path, json={"model": MODEL, **unknown[path]})
        assert (refused.status_code, refused.json()["code"]) == (404, "unknown_vector")
        assert "Send it again with PUT /v1/vectors" in refused.json()["error"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_of_tensors_is_kept_like_numbers(http: httpx.Client, dtype: str) -> None:
    numbers = NUMBERS.to(DTYPES[dtype])
    file = save({"flat": numbers, "a/row": numbers[None] * 2})
    digests = http.put("/v1/vectors", content=file, headers=SAFETENSORS).json()["digests"]
    listed = put(http, numbers.float().tolist(), (numbers.float() * 2).tolist()).json()["digests"]
    assert digests == {"flat": listed["0"], "a/row": listed["1"]}


def test_what_was_captured_can_be_kept_as_it_came(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "points": [HOOK], "positions": "mean"}
    file = http.post("/v1/capture", json={**body, "format": "safetensors"}).content
    numbers = http.post("/v1/capture", json=body).json()["results"][0]["states"][HOOK][0]
    kept = http.put("/v1/vectors", content=file, headers=SAFETENSORS).json()["digests"][HOOK]
    assert kept == put(http, numbers).json()["digests"]["0"]


def header(**about: Any) -> bytes:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **about}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"", 422, "it is shorter than its header says"),
        ((2**40).to_bytes(8, "little"), 422, "it is shorter than its header says"),
        ((2).to_bytes(8, "little") + b"[]", 422, "its header is no JSON object"),
        ((2).to_bytes(8, "little") + b"{!", 422, "its header is not JSON"),
        ((2**17).to_bytes(8, "little") + b" " * 2**17, 422, "has 131072 bytes, the most is 65536"),
        (header(dtype="I8"), 422, "'x' is in I8; F32, F16, BF16, F64, I64, I32 are read"),
        (header(dtype="I32"), 400, "'x' holds whole numbers (int32)"),
        (header(shape=[3]), 422, "'x' of shape [3] does not fill bytes 0 to 8"),
        (header(shape=[-2]), 422, "no whole numbers"),
        (header(data_offsets=[8, 16]), 422, "does not fill bytes 8 to 16"),
        (header(data_offsets=[0]), 422, "neither dtype, shape nor place"),
        (header(shape=[2, 1]), 400, "'x' has the shape [2, 1]; a vector is [width] or [1, width]"),
        (header(shape=[], data_offsets=[0, 4]), 400, "'x' has the shape []"),
        (save({}), 422, "vectors: List should have at least 1 item"),
        (save({str(n): torch.zeros(1) for n in range(65)}), 400, "65 items are too many, the most is 64"),
        (save({"x": torch.tensor([1.0, float("nan")])}), 422, "is not finite in float32 at position 1"),
        (save({"x": torch.zeros(0)}), 422, "has 0 numbers, 1 to 65536 are taken"),
        (save({"x": torch.zeros(65537)}), 422, "has 65537 numbers, 1 to 65536 are taken"),
    ],
)
def test_a_file_that_cannot_be_kept(http: httpx.Client, content: bytes, status: int, says: str) -> None:
    answer = http.put("/v1/vectors", content=content, headers=SAFETENSORS)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]


@pytest.mark.parametrize(
    ("vectors", "status", "says"),
    [
        ([{"name": "a", "vector": [1]}, {"name": "a", "vector": [2]}], 400, "there are two of the name 'a'"),
        ([{"name": "a", "vector": [1, "2"]}], 422, "vectors.0.vector: a vector to keep is a list of numbers"),
        ([{"name": "a", "vector": [1, True]}], 422, "a list of numbers"),
        ([{"name": "a", "vector": UNKNOWN}], 422, "a list of numbers or base64"),
        ([{"name": "a", "vector": [1e39]}], 422, "is not finite in float32 at position 0"),
        ([{"name": "a", "vector": "base64:float32:AAA="}], 422, "2 bytes are no whole number of float32s"),
        ([{"name": "a", "vector": [1], "hook": "x"}], 422, "there is no field 'hook'"),
    ],
)
def test_a_body_that_cannot_be_kept(http: httpx.Client, vectors: Any, status: int, says: str) -> None:
    answer = http.put("/v1/vectors", json={"vectors": vectors})
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        ("base64:float64:AAAA", "begins with one of base64:float32:, base64:float16:, base64:bfloat16:"),
        ("base64:float32", "begins with one of"),
        ("base64:float32:A-_=", "is not base64"),
        ("base64:float16:AAAA", "3 bytes are no whole number of float16s"),
        ("vec:sha256:12", "and 64 digits of 0-9a-f"),
        ("hello", "a vector is a list of numbers"),
    ],
)
def test_a_text_that_is_no_vector(http: httpx.Client, vector: str, says: str) -> None:
    steering = [{"vector": vector, "strength": 1, "hook": HOOK}]
    answer = http.post("/v1/steer", json={"prompt": TEXT, "vectors": steering})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_body")
    assert says in answer.json()["error"]
    assert answer.json()["detail"][0]["loc"] == ["body", "vectors", 0, "vector"]


def test_only_a_file_of_tensors_or_json_is_read(http: httpx.Client) -> None:
    answer = http.put("/v1/vectors", content=b"", headers={"Content-Type": "text/plain"})
    assert "must be application/json or application/x-safetensors" in answer.json()["error"]
    answer = http.post("/v1/steer", content=save({"x": torch.zeros(1)}), headers=SAFETENSORS)
    assert answer.json()["error"] == "Content-Type must be application/json"


def test_what_is_kept_is_bounded_and_the_least_used_leaves(runtime: Runtime, serve: Serve) -> None:
    kept = KeptVectors(2 * 4 * WIDTH)
    with serve(small_settings(), lambda: Wrapped(runtime, vectors=kept)).client() as client:
        first, second = put(client, NUMBERS.tolist(), NUMBERS.roll(1).tolist()).json()["digests"].values()
        steered(client, first)
        [third] = put(client, NUMBERS.roll(2).tolist()).json()["digests"].values()
        assert steered(client, first) != steered(client, third)
        body = {"prompt": TEXT, "vectors": [{"vector": second, "strength": 1, "hook": HOOK}]}
        assert client.post("/v1/steer", json=body).json()["code"] == "unknown_vector"
        refused = put(client, [0.5] * (2 * WIDTH + 1))
        assert (refused.status_code, "is larger than all that is kept" in refused.text) == (400, True)
    with serve(small_settings(), lambda: Wrapped(runtime, vectors=KeptVectors(0))).client() as client:
        for refused in (put(client, NUMBERS.tolist()), client.post("/v1/steer", json=body)):
            assert "this server keeps no vectors (KEPT_VECTORS_MIB is 0" in refused.json()["error"]


def test_the_client_captures_keeps_and_steers(server: Served) -> None:
    a, b = ["The moon and the stars.", "A planet in orbit."] * 9, ["Bake the bread."]
    with ni.connect(server.url) as m, server.client() as http:
        means: list[Any] = []
        for texts in (a, b):
            body = {"prompt": texts[:2], "points": [HOOK], "positions": "mean"}
            said = http.post("/v1/capture", json=body).json()["results"]
            means.append(np.mean([one["states"][HOOK][0] for one in said], axis=0))
        vector = m.mean_difference(a, b, HOOK)
        assert not isinstance(vector.vector, str)
        np.testing.assert_allclose(vector.vector, means[0] - means[1], rtol=0, atol=1e-4 * np.abs(means).max())
        with pytest.raises(ValueError, match="at least one text on either side"):
            m.mean_difference([], b, HOOK)

        def text(steering: ni.Steering) -> str:
            return m.steer("My friend told me about", steering, max_new_tokens=6, compare=False).steered.text

        kept = m.keep(vector)
        assert text(kept @ 2) == text(vector @ 2) != text(kept @ 0)
        assert ni.Steering.from_json((kept @ 2).to_json()) == kept @ 2
        assert "vec:sha256:" in str(kept @ 2)
        [one] = m.capture(TEXT, [HOOK, "blocks.3.hook_mlp_out"], positions="last")
        assert (one[HOOK].shape, len(one.tokens)) == ((1, WIDTH), len(one.token_ids))


def test_the_example_changes_the_subject(server: Served) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "mean_difference.py"), server.url], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert "planet" in told["+2"]
    assert "planet" not in told["+0"] + told["-1"]


def test_it_is_not_offered_on_modal() -> None:
    assert "another container" in by_name["put_vectors"].off_modal_because
