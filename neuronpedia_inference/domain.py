"""Plain values that cross between operations, runtime, scheduler and engine. No tensors, no HTTP.

Results about features are columns: arrays on the host, because millions of Python numbers would take gigabytes, and
making them holds the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.number[Any]]

MAX_STEERS = 512
"""Steers of one request: each costs a little at every step of decoding."""

READ_BY_COLUMN = frozenset(
    {
        "standard",
        "transcoder",
        "cross_layer_transcoder",
        "skip_transcoder",
        "jumprelu",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
        "gated",
    }
)
"""SAELens architectures whose features do not depend on each other."""
TEMPORAL = "temporal"
"""The SAELens architecture whose encoder attends to earlier positions (arXiv 2511.01836)."""


CENTRED = "centred writing weights: its encoder's columns are centred instead, which reads the same"
"""What an SAE may ask for, and what is done."""
UNNORMED = "what a module gives before any norm: in this model none follows it"


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

    def before(self, stop: int) -> Tokens:
        """The first so many."""
        return Tokens(self.ids[:stop], self.strings[:stop], self.is_special[:stop], self.has_bos and stop > 0)

    def longer(self, n_tokens: int) -> Tokens:
        """A text that begins like this and has so many more tokens, whichever: for what only its length matters to."""
        last = slice(len(self) - 1, len(self))
        return Tokens(
            self.ids + self.ids[last] * n_tokens,
            self.strings + self.strings[last] * n_tokens,
            self.is_special + self.is_special[last] * n_tokens,
            self.has_bos,
        )


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str
    channel: str | None = None
    """Of models that speak on several, such as gpt-oss; else None."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the template is given of it, such as `tool_calls`."""


Section = Literal["header", "content", "footer", "scaffold"]


@dataclass(frozen=True, slots=True)
class Part:
    """What a token of a rendered chat belongs to."""

    message: int | None
    """Place in the chat; None for what comes after the last message."""
    section: Section
    """header, content and footer of a message; scaffold where the template does not tell them apart."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as the model reads it."""

    text: str
    tokens: Tokens
    parts: tuple[Part, ...]
    """One per token."""


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
    hook_out: str | None = None
    """Hook point where its decoder rows live, of a transcoder whose configuration says so."""
    has_dfa: bool = False
    """True for attention-output SAEs on hook_z: direct feature attribution is served."""
    n_heads: int = 0
    """Of its own attention, where it is temporal."""
    asks: tuple[str, ...] = ()
    """What its configuration asks of the model beside a hook, and what becomes of that."""
    normalises: bool = False
    """Whether it reads what passes at another size, which differs from token to token."""

    @property
    def is_neurons(self) -> bool:
        return self.architecture == "neurons"

    @property
    def is_centred(self) -> bool:
        return CENTRED in self.asks

    @property
    def is_unnormed(self) -> bool:
        return UNNORMED in self.asks

    @property
    def is_read_by_column(self) -> bool:
        """Whether a feature is computed without all the others, so that memory is a block's and not the source's."""
        return self.is_neurons or self.architecture in READ_BY_COLUMN

    @property
    def is_temporal(self) -> bool:
        """A position's features depend on earlier positions, so that it encodes texts as a whole."""
        return self.architecture == TEMPORAL

    @property
    def unread_alone_because(self) -> str:
        """Why a feature cannot be read by itself at one position; empty if it can."""
        if self.is_temporal:
            return "its encoder attends to earlier tokens"
        return "" if self.is_read_by_column else "its features are compared with each other"

    @property
    def is_transcoder(self) -> bool:
        """Its decoder rows live at another hook than the one it reads."""
        return self.architecture.endswith("transcoder")


@dataclass(frozen=True, slots=True, eq=False)
class Dfa:
    """Direct feature attribution of one feature at its top position (full-prompt coordinates)."""

    values: Numbers
    """[pos]: one per source position."""
    target_index: int


@dataclass(frozen=True, slots=True, eq=False)
class FeatureActivations:
    """One feature over one prompt."""

    values: Numbers
    """[pos]: one per token of the full prompt, BOS included and not masked unless asked for."""
    dfa: Dfa | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RankedFeature:
    """One row of "which features fire most on this prompt"."""

    source: str
    index: int
    values: Numbers
    """[pos]"""
    max_value_index: int
    """First position of the largest of `values`."""
    sum_values: float
    dfa: Dfa | None = None

    @property
    def max_value(self) -> float:
        return float(self.values[self.max_value_index])


@dataclass(frozen=True, slots=True, eq=False)
class RankedFeatures:
    """The features that fire most on one prompt, best first, in columns."""

    sources: tuple[str, ...]
    source_numbers: Numbers
    """[feature]: places in `sources`."""
    indices: Numbers
    """[feature]"""
    values: Numbers
    """[feature, pos]"""
    max_value_indices: Numbers
    """[feature]"""
    sum_values: Numbers
    """[feature]"""
    dfa: Mapping[int, Dfa] = field(default_factory=dict)
    """By row, where the source has attributions."""

    @classmethod
    def none(cls, n_positions: int) -> RankedFeatures:
        """No feature, of a prompt of so many tokens."""
        empty = np.empty(0, dtype=np.int64)
        return cls((), empty, empty, np.empty((0, n_positions)), empty, empty)

    @property
    def firing(self) -> Numbers:
        """Rows of features above zero somewhere; what is no finite number is nothing to leave out."""
        is_finite = np.isfinite(self.values).all(axis=1)
        return np.flatnonzero((self.values > 0).any(axis=1) | ~is_finite)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> RankedFeature:
        return RankedFeature(
            source=self.sources[self.source_numbers[row]],
            index=int(self.indices[row]),
            values=self.values[row],
            max_value_index=int(self.max_value_indices[row]),
            sum_values=float(self.sum_values[row]),
            dfa=self.dfa.get(row),
        )


@dataclass(frozen=True, slots=True, eq=False)
class TopFeatures:
    """The strongest features at every position of one prompt, strongest first."""

    indices: Numbers
    """[pos, k]"""
    values: Numbers
    """[pos, k]"""

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, slots=True, eq=False)
class ActiveFeatures:
    """Every non-zero activation of one prompt, feature by feature, in order of first firing."""

    indices: Numbers
    """[feature]"""
    starts: Numbers
    """[feature]: where a feature's entries begin in `positions` and `values`."""
    ends: Numbers
    """[feature]: where they end."""
    positions: Numbers
    """[entry]: ascending within a feature."""
    values: Numbers
    """[entry]"""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> tuple[int, list[int], list[float]]:
        """A feature's index, positions and activations."""
        entries = slice(self.starts[row], self.ends[row])
        return int(self.indices[row]), self.positions[entries].tolist(), self.values[entries].tolist()


Positions = Literal["all", "last", "mean"]
"""Every token, each text's last one, or the mean over those that are not special tokens."""


Precision = Literal["float32", "float16"]
"""Of numbers in an answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """Where one attention head looks: the strongest keys of every query, in order of query and key."""

    queries: Numbers
    """[entry]"""
    keys: Numbers
    """[entry]"""
    weights: Numbers
    """[entry]: after the softmax."""
    largest: float
    """Of all weights whose query and key both lie behind position 0; 0 where there is none."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """How the strongest features are ordered and cut (contract 2.10)."""

    limit: int
    ignore_first: bool = True
    """Set position 0 to zero for every feature before anything else."""
    weights: Mapping[int, int] = field(default_factory=dict)
    """Position → how often it counts in the sum that ranks; without any, the maximum ranks."""
    scales: Mapping[str, Numbers] = field(default_factory=dict)
    """Source → [feature]: by what the number that ranks is multiplied; by 1 for sources that are not there."""
    least: float = 0.0
    """Features whose largest activation is smaller are taken not to fire at all."""


@dataclass(frozen=True, slots=True)
class FeatureValue:
    index: int
    value: float


@dataclass(frozen=True, slots=True)
class TokenEffects:
    """What a direction of the residual stream does to the next token by the direct path, in logits.

    W_U (gain ⊙ d / |d|), with the gain of the final norm: the effect of the layers in between, and the size of the
    stream, are not in it.
    """

    promoted: tuple[FeatureValue, ...] = ()
    """Token ids whose logits rise most, most first."""
    suppressed: tuple[FeatureValue, ...] = ()
    """Those whose logits fall most, most first."""
    off_because: str = ""
    """Why there are none."""


class Lens(StrEnum):
    """How the residual stream behind a block is read out."""

    LOGIT = "LOGIT_LENS"
    """As if the model ended there."""
    JACOBIAN = "JACOBIAN_LENS"
    """After what the blocks behind it do on average: the mean Jacobian J of the last block's output by this one's."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureNumbers:
    """What the weights say of one feature; scaled as its activations are."""

    encoder: Numbers | None
    """[width]; None for neurons."""
    decoder: Numbers | None
    """[decoder width]; None where there is no row of its own."""
    bias: float | None
    threshold: float | None
    """Above which it fires, of JumpReLU; both None where its kind has no such number."""
    neighbours: tuple[FeatureValue, ...]
    """Other features of its source by cosine similarity of their decoder rows."""
    effects: TokenEffects


@dataclass(frozen=True, slots=True)
class FeatureDigest:
    """The numbers that a feature was steered or read with, so that others can be told from them."""

    source: str
    index: int
    sha256: Mapping[str, str]
    """By part: of its numbers in float32, little-endian, folded as they are used."""
    norm: float | None
    """Of its decoder row; None where it has none."""


@dataclass(frozen=True, slots=True, eq=False)
class ContrastedFeature:
    """A feature on two sets of texts, a and b; of a text its mean activation counts."""

    source: str
    index: int
    effect_size: float
    """Above zero where a has more."""
    mean_a: float
    mean_b: float
    share_a: float
    """Of the texts of a on which it fires at all."""
    share_b: float
    row: Numbers | None
    """[decoder width]: its decoder row at unit length; None where it has none."""


@dataclass(frozen=True, slots=True, eq=False)
class Likelihood:
    """How likely tokens of a text are, each given all before it."""

    logprobs: Numbers
    """[pos]: natural logarithms."""
    is_likeliest: Numbers
    """[pos]: whether no other token is likelier."""
    top_ids: Numbers
    """[pos, n]: the likeliest tokens there, most likely first."""
    top: Numbers
    """[pos, n]: their log-probabilities."""

    @classmethod
    def joined(cls, parts: Sequence[Likelihood]) -> Likelihood:
        """Of one text, in order."""
        columns = ((one.logprobs, one.is_likeliest, one.top_ids, one.top) for one in parts)
        return cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))


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
    top_p: float = 1.0
    """Only the likeliest tokens are drawn, as many as it takes to reach this probability; 0 leaves one."""
    frequency_penalty: float = 0.0
    """Subtracted per earlier occurrence in the output, before the temperature, when greedy too."""
    presence_penalty: float = 0.0
    """Likewise, once for a token that has occurred."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), each id once."""
    stop: tuple[str, ...] = ()
    """Texts that end the output, of which they are no part."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """(token, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rule has taken the newest tokens of a text back."""

    rule: int
    """Which of the text's rules."""
    position: int
    """How many generated tokens were left: where others are drawn, or the text ends."""
    n_tokens: int
    """How many were taken back."""


@dataclass(frozen=True, slots=True)
class Written:
    """What one row has gained since the last time."""

    text: str = ""
    """Without the token that stops a row."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = field(default=())
    finish_reason: str | None = None
    """None while it goes on, then "stop" (end-of-sequence token), "length", "stop_string", "stop_rule" or
    "retry_exhausted"."""
    tokens: tuple[str, ...] = ()
    """`token_ids` as strings."""
    rule: int | None = field(default=None, kw_only=True)
    """The rule that ended the text at its last token."""
    refusals: tuple[Refusal, ...] = field(default=(), kw_only=True)
    numbers: Numbers | None = field(default=None, compare=False)
    """[pos, n]: what was read at the positions of the text that have become known, from the prompt's first on."""
    ending: str = ""
    """The token that stops a row, as text: wire answers end in it (contract 3.5), our own do not."""
    special: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
    """Where in `text` special tokens lie: [first character, the one behind the last)."""
