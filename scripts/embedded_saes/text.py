"""Documents -> token contexts of fixed length, split into training and held-out text by document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import archives
from .sources import PACKAGE_SOURCES, Document, Source, shuffled

CONTEXT = 128
SEED = 7
CHAT_HELD_OUT_EVERY = 18
CHAT_LICENCE = "Apache-2.0 (the model's own output)"


@dataclass(frozen=True, slots=True)
class Contexts:
    """`tokens` [context, 128] uint16, each starting with BOS; `held_out`, `source` [context] bool, str."""

    tokens: np.ndarray
    held_out: np.ndarray
    source: np.ndarray


def load(work: Path) -> dict[str, Contexts]:
    """The parts made so far, by name: `chats`, `packages-0`, `packages-1`."""
    parts: dict[str, Contexts] = {}
    for path in sorted((work / "text").glob("*.npz")):
        with np.load(path) as stored:
            parts[path.stem] = Contexts(stored["tokens"], stored["held_out"], stored["source"])
    return parts


def make_packages_part(work: Path, tokenizer: Any) -> None:
    archives.download(work / "packages")
    rows: list[tuple[list[int], bool, str]] = []
    names: dict[str, list[str]] = {}
    for source in PACKAGE_SOURCES:
        documents = shuffled(source.read(work / "packages"), SEED)
        held_out, train = split_documents(documents, source, tokenizer)
        names[source.key] = [document.name for document in held_out]
        for held, chosen, budget in (
            (True, held_out, source.held_out_tokens),
            (False, train, source.train_tokens),
        ):
            contexts = list(pack(_tokens(chosen, source.document_chars, tokenizer), tokenizer.bos_token_id))
            rows += [(context, held, source.key) for context in contexts[: budget // CONTEXT + 1]]
            print(
                f"{source.key}: {'held out' if held else 'train'} {len(contexts) * CONTEXT} of {budget}",
                flush=True,
            )
    _save(work, ("packages-0", "packages-1"), rows, names)


def split_documents(documents: list[Document], source: Source, tokenizer: Any) -> tuple[list[Document], list[Document]]:
    """(held out, training): whole documents until the held-out budget is filled, the rest for training."""
    count, filled = 0, 0
    while filled < source.held_out_tokens and count < len(documents) - 1:
        filled += len(tokenizer(documents[count].text[: source.document_chars])["input_ids"])
        count += 1
    return documents[:count], documents[count:]


def pack(documents: Iterable[list[int]], bos: int) -> Iterator[list[int]]:
    """Contexts of BOS + 127 tokens; documents follow each other, the last short context is dropped."""
    buffer: list[int] = []
    for tokens in documents:
        buffer += tokens
        while len(buffer) >= CONTEXT - 1:
            yield [bos, *buffer[: CONTEXT - 1]]
            buffer = buffer[CONTEXT - 1 :]


def _tokens(documents: list[Document], document_chars: int, tokenizer: Any) -> Iterator[list[int]]:
    for document in documents:
        yield tokenizer(document.text[:document_chars] + "\n\n", add_special_tokens=False)["input_ids"]


def make_chats_part(work: Path, tokenizer: Any) -> None:
    """Sampled chats: every second one in the chat template, the others as plain text; split by topic."""
    lines = (work / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line) for line in lines]
    topics = sorted({chat["topic"] for chat in chats})
    held_topics = set(topics[::CHAT_HELD_OUT_EVERY])
    rows: list[tuple[list[int], bool, str]] = []
    for held in (True, False):
        chosen = [chat for chat in chats if (chat["topic"] in held_topics) is held]
        plain = [f"{chat['prompt']}\n\n{chat['answer']}\n\n" for chat in chosen[1::2]]
        ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in plain)
        rows += [(context, held, "chats") for context in pack(ids, tokenizer.bos_token_id)]
        rows += [(context, held, "chats") for context in _templated(chosen[::2], tokenizer)]
    _save(work, ("chats",), rows, {"chats": sorted(held_topics)})


def _templated(chats: list[dict[str, str]], tokenizer: Any) -> Iterator[list[int]]:
    for chat in chats:
        turns = [
            {"role": "user", "content": chat["prompt"]},
            {"role": "assistant", "content": chat["answer"]},
        ]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"][:CONTEXT]
        if len(ids) == CONTEXT:
            yield ids


def _save(
    work: Path, parts: tuple[str, ...], rows: list[tuple[list[int], bool, str]], names: dict[str, list[str]]
) -> None:
    folder = work / "text"
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(SEED).permutation(len(rows))
    for part, chosen in zip(parts, np.array_split(order, len(parts)), strict=True):
        np.savez(
            folder / f"{part}.npz",
            tokens=np.array([rows[i][0] for i in chosen], dtype=np.uint16),
            held_out=np.array([rows[i][1] for i in chosen]),
            source=np.array([rows[i][2] for i in chosen]),
        )
    (folder / f"{parts[0]}-held-out.json").write_text(json.dumps(names, indent=1), encoding="utf-8")
