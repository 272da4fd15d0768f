"""Search for features that visibly steer: ranked by what they do to the output, never by their label."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .collect import residuals
from .evaluate import logits_from
from .label import firings, topic_words
from .scan import load_scan
from .text import load
from .train import SINK_RATIO, training_activations
from .words import Corpus, stem

PROMPTS = ("I think that", "The most important thing is", "Yesterday I")
NEW_TOKENS = 28
SHARES = (0.3, 0.4, 0.5)
SCREEN_SHARE = 0.4
CANDIDATES_PER_LAYER = 60
BATCH = 30
KEPT = 8
PER_LAYER = 3
TOPIC_WORDS, COMMON = 12, 0.02
WORST_LOGPROB_DROP = 1.6
MIN_DISTINCT_BIGRAMS = 0.85
MIN_TOPIC_WORDS = 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feature with the stems of the words it fires on; `gain` is their extra next-token probability."""

    layer: int
    index: int
    stems: tuple[str, ...]
    gain: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One steered continuation. Log-probabilities are the unsteered model's, mean per token, in nats."""

    layer: int
    index: int
    prompt: str
    strength: float
    plain: str
    steered: str
    topic_words: tuple[str, ...]
    logprob: float
    plain_logprob: float
    distinct_bigrams: float

    @property
    def fluent(self) -> bool:
        drop = self.plain_logprob - self.logprob
        return drop <= WORST_LOGPROB_DROP and self.distinct_bigrams >= MIN_DISTINCT_BIGRAMS


@contextmanager
def steering(model: Any, layer: int, added: Tensor) -> Iterator[None]:
    """Add `added`, [row, 1, d_model], to the residual stream after `layer`, at every position."""
    handle = model.model.layers[layer].register_forward_hook(lambda _module, _args, output: output + added)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def continue_greedily(model: Any, prompt_ids: Tensor, new_tokens: int) -> Tensor:
    """[row, pos] -> [row, new_tokens] ids; positions after the end-of-text id repeat it."""
    eos = model.config.eos_token_id
    out, cache, step = [], None, prompt_ids
    ended = torch.zeros(len(prompt_ids), dtype=torch.bool)
    for _ in range(new_tokens):
        result = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        chosen = result.logits[:, -1].argmax(-1).masked_fill(ended, eos)
        ended |= chosen == eos
        out.append(chosen)
        step = chosen[:, None]
    return torch.stack(out, 1)


def encode_prompt(tokenizer: Any, prompt: str) -> Tensor:
    """[1, pos] ids of BOS + prompt."""
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])


@torch.inference_mode()
def screen(work: Path, model: Any, tokenizer: Any, layer: int, rows: Tensor, strength: float) -> list[Candidate]:
    """The features whose row, added once, most raises the probability of the words they fire on.

    `rows` is [d_sae, d_model], unit norm.
    """
    corpus = Corpus(np.concatenate([part.tokens for part in load(work).values()]).astype(np.int64), tokenizer)
    scan = load_scan(work, layer)
    token_stems = [stem(re.sub(r"[^a-z]", "", piece.lower())) for piece in corpus.pieces]
    by_stem: dict[str, list[int]] = {}
    for token, text in enumerate(token_stems):
        if len(text) >= 3:
            by_stem.setdefault(text, []).append(token)
    prompt = encode_prompt(tokenizer, PROMPTS[0])
    base = residuals(model, prompt, (layer,))[layer]
    plain = logits_from(model, layer, base)[0, -1].softmax(-1)
    found: list[Candidate] = []
    for chunk in torch.split(torch.arange(len(rows)), 32):
        steered = base + strength * rows[chunk][:, None]
        gains = logits_from(model, layer, steered)[:, -1].softmax(-1) - plain
        for feature, gain in zip(chunk.tolist(), gains, strict=True):
            if scan.rate[feature] == 0:
                continue
            words = (word.text for word in topic_words(firings(corpus, scan, feature), corpus))
            stems = tuple(stem(word) for word in words if corpus.share(word) <= COMMON)[:TOPIC_WORDS]
            tokens = sorted(set(itertools.chain.from_iterable(by_stem.get(text, []) for text in stems)))
            # The square root favours several topic words over a single one that is repeated.
            found.append(Candidate(layer, feature, stems, gain[tokens].clamp(min=0).sqrt().sum().item()))
    return sorted(found, key=lambda candidate: -candidate.gain)[:CANDIDATES_PER_LAYER]


def try_out(model: Any, tokenizer: Any, candidates: list[Candidate], rows: Tensor, norm: float) -> list[Trial]:
    """Greedy continuations of every prompt at every strength for candidates of one layer."""
    trials: list[Trial] = []
    strengths = [float(5 * round(share * norm / 5)) for share in SHARES]
    for prompt in PROMPTS:
        ids = encode_prompt(tokenizer, prompt)
        plain = continue_greedily(model, ids, NEW_TOKENS)
        for strength, chosen in itertools.product(strengths, _batched(candidates)):
            trials += _batch_of_trials(model, tokenizer, chosen, rows, prompt, plain, strength)
    return trials


def _batched(candidates: list[Candidate]) -> list[list[Candidate]]:
    return [candidates[at : at + BATCH] for at in range(0, len(candidates), BATCH)]


@torch.inference_mode()
def _batch_of_trials(
    model: Any,
    tokenizer: Any,
    candidates: Sequence[Candidate],
    rows: Tensor,
    prompt: str,
    plain_ids: Tensor,
    strength: float,
) -> list[Trial]:
    ids = encode_prompt(tokenizer, prompt)
    prompts = ids.expand(len(candidates), -1)
    layer = candidates[0].layer
    with steering(model, layer, strength * rows[[candidate.index for candidate in candidates]][:, None]):
        new = continue_greedily(model, prompts, NEW_TOKENS)
    plain, plain_logprob = tokenizer.decode(plain_ids[0]), _mean_logprob(model, ids, plain_ids)[0]
    trials: list[Trial] = []
    for candidate, tokens, logprob in zip(candidates, new, _mean_logprob(model, prompts, new), strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        hits, distinct = _hits(text, plain, candidate.stems), _distinct_bigrams(tokens.tolist())
        trials.append(
            Trial(
                layer=layer,
                index=candidate.index,
                prompt=prompt,
                strength=strength,
                plain=plain,
                steered=text,
                topic_words=hits,
                logprob=logprob,
                plain_logprob=plain_logprob,
                distinct_bigrams=distinct,
            )
        )
    return trials


def _mean_logprob(model: Any, prompts: Tensor, new: Tensor) -> list[float]:
    logits = model(input_ids=torch.cat([prompts, new], 1), use_cache=False).logits
    logprobs = logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, new[..., None]).mean((1, 2)).tolist()


def _hits(text: str, plain: str, stems: Iterable[str]) -> tuple[str, ...]:
    """The topic stems that the steered text has and the plain text lacks."""
    return tuple(sorted((_stems(text) - _stems(plain)) & set(stems)))


def _stems(text: str) -> set[str]:
    return {stem(word) for word in re.findall(r"[a-z']+", text.lower())}


def _distinct_bigrams(tokens: list[int]) -> float:
    pairs = list(itertools.pairwise(tokens))
    return len(set(pairs)) / max(len(pairs), 1)


def choose(trials: list[Trial]) -> list[Trial]:
    """The best fluent trials on topic: one per feature and topic, at most three per layer."""
    rarity = _rarity(trials)
    scored = [(_score(trial, rarity), trial) for trial in trials if trial.fluent]
    good = [(score, trial) for score, trial in scored if len(trial.topic_words) >= MIN_TOPIC_WORDS]
    chosen: list[Trial] = []
    for _, trial in sorted(good, key=lambda pair: (-pair[0], pair[1].layer, pair[1].index, pair[1].strength)):
        known = any(
            (other.layer, other.index) == (trial.layer, trial.index) or set(other.topic_words) & set(trial.topic_words)
            for other in chosen
        )
        if not known and sum(other.layer == trial.layer for other in chosen) < PER_LAYER:
            chosen.append(trial)
    return chosen[:KEPT]


def _rarity(trials: list[Trial]) -> dict[str, float]:
    """Stem -> how seldom steering by any feature brings it in: words that every steered text has say little."""
    texts: dict[tuple[int, int], set[str]] = {}
    for trial in trials:
        texts.setdefault((trial.layer, trial.index), set()).update(_stems(trial.steered))
    counts = Counter(itertools.chain.from_iterable(texts.values()))
    return {word: math.log(len(texts) / count) for word, count in counts.items()}


def _score(trial: Trial, rarity: dict[str, float]) -> float:
    """Rarity of the topic words brought in, less the log-probability that they cost."""
    return sum(rarity[word] for word in trial.topic_words) - max(0.0, trial.plain_logprob - trial.logprob)


@torch.inference_mode()
def examples(model: Any, tokenizer: Any, chosen: list[Trial], saes: dict[int, Any], labels: dict[int, list[str]]):
    """The chosen trials once more, one row at a time as a server would run them, in the stored form."""
    stored = []
    for trial in chosen:
        ids = encode_prompt(tokenizer, trial.prompt)
        plain = continue_greedily(model, ids, NEW_TOKENS)[0]
        with steering(model, trial.layer, trial.strength * saes[trial.layer].W_dec[trial.index][None, None]):
            steered = continue_greedily(model, ids, NEW_TOKENS)[0]
        stored.append(
            {
                "source": f"{trial.layer}-res-4k",
                "index": trial.index,
                "label": labels[trial.layer][trial.index],
                "prompt": trial.prompt,
                "strength": trial.strength,
                "steer_method": "SIMPLE_ADDITIVE",
                "plain": tokenizer.decode(plain, skip_special_tokens=True),
                "steered": tokenizer.decode(steered, skip_special_tokens=True),
            }
        )
    return stored


def median_norm(work: Path, layer: int) -> float:
    """Median norm of the residual stream at the counted training positions."""
    return training_activations(work, layer).sink_norm / SINK_RATIO


def search(work: Path, model: Any, tokenizer: Any, layer: int, rows: Tensor) -> None:
    """Screen all features of a layer, try the best, and write `steer/LAYER.jsonl`."""
    norm = median_norm(work, layer)
    candidates = screen(work, model, tokenizer, layer, rows, SCREEN_SHARE * norm)
    trials = try_out(model, tokenizer, candidates, rows, norm)
    (work / "steer").mkdir(exist_ok=True)
    text = "".join(json.dumps(asdict(trial)) + "\n" for trial in trials)
    (work / "steer" / f"{layer}.jsonl").write_text(text, encoding="utf-8")


def load_trials(work: Path) -> list[Trial]:
    """The trials of every layer searched so far."""
    files = sorted((work / "steer").glob("*.jsonl"))
    lines = itertools.chain.from_iterable(file.read_text(encoding="utf-8").splitlines() for file in files)
    stored = (json.loads(line) for line in lines)
    return [Trial(**{**trial, "topic_words": tuple(trial["topic_words"])}) for trial in stored]
