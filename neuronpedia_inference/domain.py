"""Plain values that cross between operations, runtime, scheduler and engine. No tensors, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised prompt; the three tuples have one entry per token."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    is_special: tuple[bool, ...]
    has_bos: bool
    """True when position 0 is the tokenizer's BOS token."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Source:
    """Something that gives features: an SAE, or the MLP neurons of one layer."""

    name: str
    """"7-res-jb" for an SAE, the bare layer "3" for neurons."""
    source_set: str
    """"res-jb", or "neurons"."""
    layer: int
    """The block its hook lies in (not always the number in its name)."""
    hook: str
    """Hook point in TransformerLens spelling, "blocks.7.hook_resid_pre"."""
    n_features: int
    """d_sae, or d_mlp for neurons."""
    width: int
    """d_in: width of the hook's tensor (heads concatenated)."""
    architecture: str
    """SAELens architecture, or "neurons"."""
    has_dfa: bool = False
    """True for attention-output SAEs on hook_z: direct feature attribution is served."""

    @property
    def is_neurons(self) -> bool:
        return self.architecture == "neurons"

    @property
    def is_transcoder(self) -> bool:
        """Its decoder rows live at another hook than the one it reads."""
        return self.architecture.endswith("transcoder")


@dataclass(frozen=True, slots=True)
class Dfa:
    """Direct feature attribution of one feature at its top position (full-prompt coordinates)."""

    values: tuple[float, ...]
    """One per source position."""
    target_index: int

    @property
    def max_value(self) -> float:
        return max(self.values)


@dataclass(frozen=True, slots=True)
class FeatureActivations:
    """One feature over one prompt."""

    values: tuple[float, ...]
    """One per token of the full prompt, BOS included and not masked unless asked for."""
    dfa: Dfa | None = None


@dataclass(frozen=True, slots=True)
class RankedFeature:
    """One row of "which features fire most on this prompt"."""

    source: str
    index: int
    values: tuple[float, ...]
    max_value: float
    max_value_index: int
    sum_values: float
    dfa: Dfa | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """How `Runtime.ranked_features` orders and cuts (contract 2.10)."""

    limit: int
    ignore_first: bool = True
    """Set position 0 to zero for every feature before anything else."""
    token_indexes: tuple[int, ...] = ()
    """Rank by the sum over these positions instead of by the maximum; duplicates count twice."""


@dataclass(frozen=True, slots=True)
class FeatureValue:
    index: int
    value: float


@dataclass(frozen=True, slots=True)
class ActiveFeature:
    """A non-zero activation."""

    position: int
    index: int
    value: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Greedy when `temperature` is 0."""

    max_new_tokens: int
    temperature: float = 0.0
    freq_penalty: float = 0.0
    """Subtracted per earlier occurrence in prompt and output, after the temperature; not when greedy."""
    seed: int = 0
    n_logprobs: int = 0
    """Candidates reported per token; 0 reports no log-probabilities at all."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """(token, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class Written:
    """What one row has gained since the last time."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = field(default=())
    finish_reason: str | None = None
    """None while it goes on, then "stop" (end-of-sequence token) or "length"."""
