"""What ends a start, and with which line: a table of the reference. The tests hold it against what is said."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

LINES: Mapping[str, str] = {
    "no tokenizer": (
        "Cannot load the tokenizer of '…': … | '…' has no tokenizer that works: … becomes no tokens that can be read "
        "back. Put tokenizer.json (or tokenizer.model) and tokenizer_config.json beside the weights."
    ),
    "tokenizer of another model": (
        "The tokenizer of '…' is not this model's: … has the token …, and the model's last one is …."
    ),
    "a typo in the path": "MODEL_ID: there is no folder '…'. Did you mean '…'?",
    "GGUF only": (
        "'…' holds no model: it needs config.json and *.safetensors: it holds …, which "
        'MODEL_FROM_PRETRAINED_KWARGS=\'{"gguf_file": "…"}\' loads.'
    ),
    "another GGUF file": "MODEL_FROM_PRETRAINED_KWARGS: Unknown gguf_file '…'. Did you mean '…'? Available: …. (…)",
    "a subfolder that is not there": (
        "MODEL_FROM_PRETRAINED_KWARGS, subfolder: there is no folder '…'. Did you mean '…'?"
    ),
    "an unknown option": (
        "Cannot load the model '…': MODEL_FROM_PRETRAINED_KWARGS: '…' is neither an option of from_pretrained nor in "
        "the configuration of this model"
    ),
    "an option that is not taken": "Bad setting. MODEL_FROM_PRETRAINED_KWARGS: '…' is not taken: …",
    "packages": ("The weights of '…' are quantised by …, which needs packages that are not installed: pip install …"),
    "another way to quantise": (
        "The weights of '…' are quantised by '…', which is not served (bitsandbytes, AWQ, GPTQ, FP8, MXFP4 are)."
    ),
    "tokenizer larger than the embedding": (
        "the tokenizer has tokens without an embedding, … of them from … on (the model's last is …): texts with them "
        "are refused"
    ),
}
"""By situation; `…` stands for what differs, ` | ` is between two that may be said."""

MEANINGS: Mapping[str, str] = {
    "no tokenizer": "The folder has none, or one that is empty. A text has to become tokens and text again.",
    "tokenizer of another model": "BOS, or a common text, has a token for which the model has no embedding.",
    "a typo in the path": "What begins as a path is a folder, and never asked for on the hub.",
    "GGUF only": "GGUF is read only where its file is named.",
    "another GGUF file": "The folder has no such file.",
    "a subfolder that is not there": "`subfolder` is looked for in the folder.",
    "an unknown option": "Neither transformers nor the model's configuration knows it.",
    "an option that is not taken": "Another setting says it, or it would be ignored.",
    "packages": (
        "bitsandbytes (4 and 8 bit), AWQ, GPTQ, FP8 and MXFP4 are loaded by transformers, where what it needs is "
        "installed. Without a GPU it widens FP8 and MXFP4 to bfloat16."
    ),
    "another way to quantise": "It would be read as if it were not quantised.",
    "tokenizer larger than the embedding": (
        "A warning. The start goes on, and a request whose text has such a token is a 400 that names it."
    ),
}


def said_at_start(situation: str, line: str) -> bool:
    """Whether this is the line that the reference has for a situation."""
    return any(re.fullmatch(re.escape(one).replace("…", ".+"), line) for one in _of(situation))


def starts(table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> str:
    """The section's text."""
    rows = [("<br>".join(f"`{one}`" for one in _of(situation)), meaning) for situation, meaning in MEANINGS.items()]
    return (
        "A start that cannot serve the truth ends in one line and exit code 1; `…` stands for what differs. A copy of "
        "the embedded weights that was altered, in whatever byte, ends nothing: it is made anew. Every file of it is "
        "read through once after each change. Of chat templates by names the one called `default` is served; a chat "
        "that a template cannot render is a 400 with the template's reason.\n\n" + table(("line", "when"), rows)
    )


def _of(situation: str) -> list[str]:
    return LINES[situation].split(" | ")
