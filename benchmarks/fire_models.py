"""Small models, two of which show at once what a large one would show some day."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

D_MODEL = 288
SAID = " aé€b😀"
"""What the reciting model says over and over: characters of one, two, three and four bytes, no byte twice."""
SPACES = " a  b"
"""A text with a run of spaces, one of them the tokenizer's own."""
_WORDS = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁▁": 5, "▁a": 6}
_FIRST_BYTE = len(_WORDS)


def small(folder: Path) -> Path:
    """A model that starts in a moment."""
    from transformers.utils.logging import disable_progress_bar

    from tests import models

    disable_progress_bar()
    return models.save("llama", folder)


def wide(folder: Path) -> Path:
    """A model whose logits float32 can hold and float16 cannot."""
    import torch
    from transformers import AutoModelForCausalLM

    built: Any = AutoModelForCausalLM.from_pretrained(small(folder))
    head = built.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(30_000 / head.abs().max())
    built.save_pretrained(folder)
    return folder


def reciting(folder: Path) -> Path:
    """A model that says SAID, token by token: each is a direction of the residual stream, to which blocks add little.

    Its tokenizer is of Llama 2's kind: words with their space in front, bytes for what is in no word.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    order = [_WORDS["▁a"], *map(_byte, "é€".encode()), _WORDS["b"], *map(_byte, "😀".encode())]
    following = {**dict.fromkeys(range(_FIRST_BYTE + 256), order[0]), **dict(pairwise([*order, order[0]]))}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(following),
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in built.model.layers:
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(0.1)
        built.model.embed_tokens.weight.copy_(torch.eye(len(following), D_MODEL))
        built.lm_head.weight.zero_()
        for token, after in following.items():
            built.lm_head.weight[after, token] = 1
    disable_progress_bar()
    built.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _byte(byte: int) -> int:
    return _FIRST_BYTE + byte


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = _WORDS | {f"<0x{byte:02X}>": _byte(byte) for byte in range(256)}
    inner = Tokenizer(BPE(pieces, [("▁", "▁"), ("▁", "a")], byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
