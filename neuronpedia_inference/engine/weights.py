"""Loading a Hugging Face causal language model and its tokenizer, or one line that says what is wrong with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from neuronpedia_inference import load_options
from neuronpedia_inference.engine import quantised
from neuronpedia_inference.engine.description import accept_integers
from neuronpedia_inference.errors import StartupError

log = logging.getLogger(__name__)

_A_TEXT = "The cat sat on the mat."
_UNKNOWN_OPTION = re.compile(r"unexpected keyword argument '(\w+)'")
_LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
"""What libraries raise of files that are missing, broken, or hold something else than they should."""
_TOKENIZER_ERRORS = (*_LOAD_ERRORS, AssertionError, NotImplementedError)


def pick_device(wanted: str) -> str:
    """ "auto" takes CUDA, then MPS, then the CPU. Raises StartupError for a device that is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = wanted.partition(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[kind]:
        raise StartupError(f"DEVICE is {wanted!r}, but this machine has no {kind} device. Use auto or cpu.")
    number = wanted.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{n}" for n in range(torch.cuda.device_count()))
        raise StartupError(f"DEVICE is {wanted!r}, but this machine has {there} only.")
    return wanted


def quantisation(where: str, options: Mapping[str, Any]) -> str | None:
    """How the weights there are quantised, or are to be; None for plain ones. Raises StartupError.

    where, options: as for `load_weights`.
    """
    if "gguf_file" in options:
        return None
    try:
        config, _ = PreTrainedConfig.get_config_dict(where, **load_options.of_tokenizer(options))
    except _LOAD_ERRORS as exc:
        raise StartupError(f"Cannot load the model {where!r}: {first_line(exc)}{_culprit(where, options)}") from exc
    if not isinstance(config, Mapping):
        raise StartupError(f"Cannot load the model {where!r}: its config.json holds no object.")
    return quantised.method_of(config, options)


def load_weights(
    where: str, *, dtype: str, device: str, options: Mapping[str, Any], method: str | None = None
) -> PreTrainedModel:
    """where: local folder or Hugging Face name; dtype: "auto" or a torch dtype's name; options: more arguments;
    method: what `quantisation` says.

    Safetensors only. Raises StartupError when files are missing, corrupt or incomplete: a weight that the checkpoint
    lacks would be made up at random.
    """
    transformers_logging.disable_progress_bar()
    arguments: dict[str, Any] = {"dtype": dtype, **options, "use_safetensors": True, "output_loading_info": True}
    if "gguf_file" in options:
        del arguments["use_safetensors"]
    if method is not None:
        quantised.check(where, method, device, has_gpu=torch.cuda.is_available())
        arguments["device_map"] = {"": device}
    try:
        loaded: Any = _tolerant(AutoModelForCausalLM.from_pretrained, where, **arguments)
    except _LOAD_ERRORS as exc:
        raise StartupError(f"Cannot load the model {where!r}: {_gist(exc, options)}{_culprit(where, options)}") from exc
    model, report = loaded
    lacking = sorted(report.get("missing_keys", ())) + sorted(str(k) for k in report.get("mismatched_keys", ()))
    if lacking:
        raise StartupError(f"The weights of {where!r} are incomplete: {len(lacking)} missing, {lacking[0]} first.")
    model.eval().requires_grad_(False)
    return model if method is not None else model.to(device)


def load_tokenizer(where: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights, found to turn a text into tokens and back. Raises StartupError.

    where, options: as for `load_weights`. Where files are missing some tokenizers are made all the same, and are empty.
    """
    try:
        tokenizer: Any = _tolerant(AutoTokenizer.from_pretrained, where, **load_options.of_tokenizer(options))
        ids = list(tokenizer.encode(_A_TEXT, add_special_tokens=False))
        is_empty = not set(ids) - {tokenizer.unk_token_id} or not tokenizer.decode(ids).strip()
    except _TOKENIZER_ERRORS as exc:
        raise StartupError(f"Cannot load the tokenizer of {where!r}: {first_line(exc)}") from exc
    if is_empty:
        raise StartupError(
            f"{where!r} has no tokenizer that works: {_A_TEXT!r} becomes no tokens that can be read back. "
            "Put tokenizer.json (or tokenizer.model) and tokenizer_config.json beside the weights."
        )
    return tokenizer


def check_vocabulary(where: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises StartupError where a common text or BOS has tokens without an embedding; warns of others.

    Requests with these others are refused one by one.
    """
    n_embeddings = len(cast(Any, model.get_input_embeddings()).weight)
    needed = {"BOS": tokenizer.bos_token_id, repr(_A_TEXT): max(tokenizer.encode(_A_TEXT, add_special_tokens=False))}
    for what, largest in needed.items():
        if isinstance(largest, int) and largest >= n_embeddings:
            raise StartupError(
                f"The tokenizer of {where!r} is not this model's: {what} has the token {largest}, and the model's last "
                f"one is {n_embeddings - 1}."
            )
    beyond = sorted(i for i in tokenizer.get_vocab().values() if i >= n_embeddings)
    if beyond:
        log.warning(
            "the tokenizer has tokens without an embedding, %d of them from %d on (the model's last is %d): texts with "
            "them are refused",
            len(beyond),
            beyond[0],
            n_embeddings - 1,
        )


def _tolerant(load: Callable[..., Any], where: str, **arguments: Any) -> Any:
    """Once more, where a configuration has an integer for a number, as those of DeepSeek-V3 do."""
    try:
        return load(where, **arguments)
    except StrictDataclassError:
        accept_integers()
        return load(where, **arguments)


def first_line(exc: BaseException) -> str:
    """The gist of an error on one line: its first, and the next where the first introduces it."""
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return " ".join(line.strip() for line in (lines[:2] if lines[0].endswith(":") else lines[:1]))


def _gist(exc: BaseException, options: Mapping[str, Any]) -> str:
    """Of an error while a model was loaded; an option that nothing takes is named as such."""
    unknown = _UNKNOWN_OPTION.search(str(exc))
    if isinstance(exc, TypeError) and unknown and unknown[1] in options:
        return (
            f"MODEL_FROM_PRETRAINED_KWARGS: {unknown[1]!r} is neither an option of from_pretrained nor in the "
            "configuration of this model"
        )
    return first_line(exc)


def _culprit(where: str, options: Mapping[str, Any]) -> str:
    """The first weights file that cannot be read, if that is what is wrong."""
    if "gguf_file" in options:
        return ""
    try:
        folder = Path(where) if Path(where).is_dir() else Path(snapshot_download(where, local_files_only=True))
    except (OSError, ValueError):
        return ""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                continue
        except (OSError, SafetensorError):
            return f" (file {file})"
    return "" if files else f" ({folder} holds no *.safetensors file)"
