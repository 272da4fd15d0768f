"""The page and the reference: open, the same for every deployment, and from nowhere else."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest
from served import SECRET, Serve, Served, on_a_port, small_settings

from neuronpedia_inference.errors import NotReady
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web.app import create_app
from neuronpedia_inference.web.openapi import GROUPS
from neuronpedia_inference.web.pages import ASSETS

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "neuronpedia_inference" / "web"
OWN = [path for folder in ("page", "reference") for path in (WEB / folder).iterdir() if "swagger-ui" not in path.name]
NAMED = {
    "model_id": "ours/secret-model",
    "sae_sets": "hidden-set",
    "secret": "quite-a-key",
    "token_limit": 41,
    "labels_dir": "kept-apart",
    "sentry_environment": "night-shift",
}
"""Settings of a deployment that nobody outside is to learn."""


def never() -> Runtime:
    raise NotReady("not loaded")


@pytest.mark.parametrize("path", ASSETS)
def test_every_deployment_gives_the_same_bytes_to_everybody(server: Served, serve: Serve, path: str) -> None:
    other = serve(small_settings(**NAMED), never)
    with server.client() as ours, other.client() as theirs:
        answers = [ours.get(path), theirs.get(path)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    kept = ("content-type", "content-security-policy", "etag", "cache-control", "x-content-type-options")
    assert all(answers[0].headers[name] == answers[1].headers[name] for name in kept)
    for value in ("secret-model", "hidden-set", "quite-a-key", "kept-apart", "night-shift"):
        assert value.encode() not in answers[1].content


def test_the_document_has_its_parts_and_an_example_of_every_error(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operations = [about for item in document["paths"].values() for about in item.values()]
    assert [tag["name"] for tag in document["tags"]] == list(GROUPS)
    assert {tag for about in operations for tag in about["tags"]} <= set(GROUPS)
    for about in operations:
        assert any("example" in part for part in about.get("parameters") or [{"example": ""}]), about["operationId"]
        for status, answer in about["responses"].items():
            assert status == "200" or answer["$ref"].startswith("#/components/responses/")
    for answer in document["components"]["responses"].values():
        [content] = answer["content"].values()
        assert content["examples"]
        assert all(one["value"] and one["summary"] for one in content["examples"].values())


@pytest.mark.long
def test_every_example_of_the_reference_can_be_sent(http: httpx.Client) -> None:
    served = http.get("/v1/capabilities").json()["endpoints"]
    document = http.get("/openapi.json").json()
    for path, item in document["paths"].items():
        body = item.get("post", {}).get("requestBody")
        for example in body["content"]["application/json"]["examples"].values() if body else ():
            is_served = served.get(item["post"]["operationId"], True)
            if not is_served or ("JACOBIAN_LENS" in str(example) and not served["lens_jacobian"]):
                continue  # nor does /docs offer it then
            answer = http.post(path, json=example["value"])
            assert answer.status_code == 200, (path, answer.text)


def test_a_browser_is_told_to_keep_to_this_server(http: httpx.Client) -> None:
    for path in ASSETS:
        headers = http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
    assert "require-trusted-types-for 'script'" in http.get("/").headers["content-security-policy"]


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_file_of_ours_names_another_host_or_holds_what_the_policy_forbids(path: Path) -> None:
    if path.suffix in (".html", ".css", ".js"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text)
        assert not re.search(r"<style|<script(?![^>]* src=)| on\w+=|style=\"|innerHTML|insertAdjacentHTML", text)
        assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text)
        assert len(text.splitlines()) <= 500


def test_a_file_comes_once_and_packed(http: httpx.Client) -> None:
    path = "/reference/swagger-ui-bundle.js"
    whole = (WEB / path.removeprefix("/")).read_bytes()
    with http.stream("GET", path, headers={"Accept-Encoding": "gzip"}) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        packed = b"".join(answer.iter_raw())
    assert gzip.decompress(packed) == whole
    assert len(packed) == int(answer.headers["content-length"]) < len(whole) / 3
    plain = http.get(path, headers={"Accept-Encoding": "identity"})
    assert plain.content == whole
    again = http.get(path, headers={"If-None-Match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = http.head(path, headers={"Accept-Encoding": "gzip"})
    assert (head.content, head.headers["content-length"]) == (b"", str(len(packed)))


def test_other_paths_are_not_there(http: httpx.Client, locked_server: Served) -> None:
    for path in ("/page/", "/page/nothing.js", "/page/%2e%2e/app.py", "/reference/pages.py", "/index.html"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert http.post("/").json()["error"] == "/ is asked by GET, not by POST."
    with locked_server.client() as client:
        assert client.get("/page/nothing.js").status_code == 401
        assert client.get("/docs").text == http.get("/docs").text


def test_names_and_pages_of_others_are_refused_here_too(http: httpx.Client, runtime: Runtime) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        for path in ("/", "/docs", "/openapi.json", "/page/fonts.css"):
            assert http.get(path, headers=headers).json()["code"] == "forbidden"
    app = create_app(small_settings(secret=SECRET), lambda: runtime)
    with on_a_port(app, 60.0) as (_, url):
        assert "<main" in httpx.get(f"{url}/", headers={"Host": "box.lan"}).text


@pytest.mark.long
def test_the_wheel_has_every_file_of_them(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    copy = tmp_path / "tree"
    subprocess.run(["git", "clone", "-q", "--depth", "1", ROOT.as_uri(), str(copy)], check=True, capture_output=True)
    subprocess.run([*build, "-w", str(tmp_path), "."], cwd=copy, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    committed = {
        str(path.relative_to(copy))
        for folder in ("page", "reference")
        for path in (copy / "neuronpedia_inference" / "web" / folder).iterdir()
    }
    assert committed <= set(zipfile.ZipFile(wheel).namelist())
