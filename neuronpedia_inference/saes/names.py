"""Which model names mean the same model."""

from __future__ import annotations

_SAME_MODEL: tuple[tuple[str, ...], ...] = (
    ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("gpt2-small", "openai-community/gpt2", "gpt2"),
    ("gpt2-medium", "openai-community/gpt2-medium"),
    ("gpt2-large", "openai-community/gpt2-large"),
    ("gpt2-xl", "openai-community/gpt2-xl"),
    ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
    ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
    ("gemma-2b", "google/gemma-2b"),
    ("gemma-2b-it", "google/gemma-2b-it"),
    ("gemma-2-2b", "google/gemma-2-2b"),
    ("gemma-2-2b-it", "google/gemma-2-2b-it"),
    ("gemma-2-9b", "google/gemma-2-9b"),
    ("gemma-2-9b-it", "google/gemma-2-9b-it"),
    ("gemma-2-27b", "google/gemma-2-27b"),
    ("gemma-2-27b-it", "google/gemma-2-27b-it"),
    ("gemma-3-270m", "google/gemma-3-270m"),
    ("gemma-3-270m-it", "google/gemma-3-270m-it"),
    ("gemma-3-1b", "google/gemma-3-1b-pt"),
    ("gemma-3-1b-it", "google/gemma-3-1b-it"),
    ("gemma-3-4b", "google/gemma-3-4b-pt"),
    ("gemma-3-4b-it", "google/gemma-3-4b-it"),
    ("gemma-3-12b", "google/gemma-3-12b-pt"),
    ("gemma-3-12b-it", "google/gemma-3-12b-it"),
    ("gemma-3-27b", "google/gemma-3-27b-pt"),
    ("gemma-3-27b-it", "google/gemma-3-27b-it"),
    ("llama3-8b-it", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("llama3.1-8b", "meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
    ("llama3.1-8b-it", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
    ("llama3.3-70b-it", "meta-llama/Llama-3.3-70B-Instruct"),
    ("deepseek-r1-distill-llama-8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ("qwen2.5-7b-it", "Qwen/Qwen2.5-7B-Instruct"),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
    ("qwen3-4b", "Qwen/Qwen3-4B"),
    ("qwen3-8b", "Qwen/Qwen3-8B"),
    ("qwen3-14b", "Qwen/Qwen3-14B"),
    ("gpt-oss-20b", "openai/gpt-oss-20b"),
)

_FINETUNED = ("-it", "-Instruct")
"""What the name of a finetuned model adds to that of its base; some bases add `-Base` instead."""
_BASE_OF = {
    "llama3.1-8b-it": "llama3.1-8b",
    "deepseek-r1-distill-llama-8b": "llama3.1-8b",
}

_GROUP_OF = {name: group for group in _SAME_MODEL for name in group}


def aliases(model_id: str) -> tuple[str, ...]:
    """Every known name of a model, the given one first."""
    return tuple(dict.fromkeys((model_id, *_GROUP_OF.get(model_id, ()))))


def hugging_face_name(model_id: str) -> str:
    """gpt2-small → openai-community/gpt2; folders and full names as they are."""
    return next((name for name in aliases(model_id) if "/" in name), model_id)


def bases(model_id: str) -> tuple[str, ...]:
    """Names that the model it was finetuned from may have, none of its own among them."""
    own = aliases(model_id)
    guesses = [_BASE_OF[name] for name in own if name in _BASE_OF]
    for name in own:
        guesses += [name.removesuffix(ending) for ending in _FINETUNED if name.endswith(ending)]
        guesses.append(f"{name}-Base")
    return tuple(dict.fromkeys(alias for guess in guesses for alias in aliases(guess) if alias not in own))


def lookup_order(model_id: str) -> tuple[str, ...]:
    """Names to try in SAELens's directory: those of the model, then those of its base."""
    return (*aliases(model_id), *bases(model_id))


def all_names() -> tuple[str, ...]:
    """Every name in the table."""
    return tuple(_GROUP_OF)
