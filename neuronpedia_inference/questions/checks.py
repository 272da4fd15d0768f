"""What is refused before any tensor is touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neuronpedia_inference.domain import Numbers, Source, Tokens
from neuronpedia_inference.errors import InvalidRequest


def check_index(source: Source, index: int) -> None:
    """Raises InvalidRequest unless 0 <= index < n_features."""
    if not 0 <= index < source.n_features:
        raise InvalidRequest(
            f"Feature index {index} is out of range for {source.name}, which has {source.n_features} features "
            f"(0 to {source.n_features - 1})."
        )


def check_vector(vector: Sequence[float] | Numbers, width: int, where: str) -> None:
    """Raises InvalidRequest for the wrong length or a number that is not finite in float32."""
    if len(vector) != width:
        raise InvalidRequest(f"The vector for {where!r} has {len(vector)} numbers; {width} are needed.")
    is_finite = np.abs(np.asarray(vector, dtype=np.float64)) <= np.finfo(np.float32).max
    if not is_finite.all():
        raise InvalidRequest(f"The vector for {where!r} is not finite in float32 at position {is_finite.argmin()}.")


def check_prompts(prompts: Sequence[Tokens], vocab_size: int, *, at_least: int = 1) -> None:
    """Raises InvalidRequest for a prompt with fewer tokens than the question needs, or with unknown ones."""
    for prompt in prompts:
        if len(prompt) < at_least:
            short = f"has {len(prompt)} tokens, {at_least} needed" if prompt.ids and at_least > 1 else "is empty"
            raise InvalidRequest(f"Prompt {short}.")
        largest = max(prompt.ids)
        if largest >= vocab_size:
            name = prompt.strings[prompt.ids.index(largest)]
            raise InvalidRequest(
                f"The model has no embedding for token {name!r} (id {largest}): its last id is {vocab_size - 1}. "
                "The tokenizer knows more than the model; leave this token out."
            )
