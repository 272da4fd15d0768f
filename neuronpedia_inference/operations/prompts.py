"""What is checked before anything is computed: model name, source, number of prompts, their length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from neuronpedia_inference.domain import Source, Tokens
from neuronpedia_inference.errors import NO_SAES, InvalidRequest, LimitExceeded

if TYPE_CHECKING:
    from neuronpedia_inference.persona import Persona
    from neuronpedia_inference.runtime import Runtime


def check_model(model: str, rt: Runtime) -> None:
    """In strict mode only: refuses a model that is not the one served."""
    if rt.settings.strict_model and model not in rt.model.known_names:
        raise InvalidRequest(f"This server serves {rt.model.id!r}, not {model!r}")


def choose_source(named: str | None, every: Callable[[], Sequence[Source]]) -> str:
    """The source named, or the only one there is. Raises InvalidRequest where there are others, or none."""
    return the_only("source", [source.name for source in every()]) if named is None else named


def the_only(field: str, names: Sequence[str]) -> str:
    """What a field means that names nothing. Raises InvalidRequest unless there is exactly one to choose."""
    if not names:
        raise InvalidRequest(f"{field}: there is none to choose. {NO_SAES}")
    if len(names) > 1:
        raise InvalidRequest(f"{field}: name one, there is more than one to choose. Available: {', '.join(names[:12])}")
    return names[0]


def counted_from(tokens: Tokens, *, ignore_bos: bool) -> int:
    """The first position that counts: 1 behind a BOS token that is ignored, else 0."""
    return 1 if ignore_bos and tokens.has_bos else 0


def tokenize_prompts(
    rt: Runtime, prompts: Sequence[str], bos: Literal["once", "natural"], *, allow_empty: bool = True
) -> list[Tokens]:
    """Prompts as tokens, each at least one; refuses others. More than one share the length limit."""
    if not prompts:
        raise InvalidRequest("At least one prompt is required")
    if not allow_empty and not all(prompts):
        raise InvalidRequest("Prompt is empty")
    return [_tokenize(rt, prompt, bos, batch=len(prompts) > 1) for prompt in prompts]


def _tokenize(rt: Runtime, prompt: str, bos: Literal["once", "natural"], *, batch: bool) -> Tokens:
    tokens = rt.tokenize(prompt, bos, batch=batch)
    if not tokens.ids:
        raise InvalidRequest("Prompt is empty")
    return tokens


def check_size(per_token: int, batch: Sequence[Tokens], what: str, rt: Runtime) -> None:
    """Refuses an answer of so many activations for each token, `what` says of what, that it exceeds its bound."""
    n_tokens = sum(map(len, batch))
    most = rt.settings.max_result_values
    if per_token * n_tokens > most:
        raise LimitExceeded(
            f"{per_token} {what} for {n_tokens} tokens are {per_token * n_tokens} activations, the most in one answer "
            f"is {most}. Ask for fewer, send shorter prompts, or raise MAX_RESULT_VALUES."
        )


def persona_here(rt: Runtime) -> Persona:
    """Raises InvalidRequest where there is none."""
    if rt.persona is None:
        raise InvalidRequest(
            f"No persona axes are served for {rt.model.name!r}. Start the server with PERSONA_DIR, a folder of them."
        )
    return rt.persona
