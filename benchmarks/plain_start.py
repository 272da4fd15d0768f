"""What every server of a model has to do before it can answer: torch, transformers, tokenizer, weights. And no more."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    AutoTokenizer.from_pretrained(sys.argv[1])
    AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
    print("read", flush=True)
