"""A small task of lm-evaluation-harness, scored through a server and by plain Hugging Face: the scores are the same.

    pip install "lm-eval[api]" torch transformers
    python examples/harnesses/lm_eval_facts.py http://127.0.0.1:5002/v1 smollm2-135m-instruct FOLDER_OF_THE_WEIGHTS

`facts.jsonl` beside this file is the task: by likelihood (`local-completions`), and as a chat
(`local-chat-completions`).
"""

# The harness is no dependency of this project.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts.jsonl")
DATA = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(FACTS)}}, "test_split": "test"}
BY_LIKELIHOOD = {
    "task": "facts",
    **DATA,
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
AS_A_CHAT = {
    "task": "facts_chat",
    **DATA,
    "output_type": "generate_until",
    "doc_to_text": "Finish the sentence with one word. {{question}}",
    "doc_to_target": "{{target|lower}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
    "filter_list": [
        {
            "name": "word",
            "filter": [
                {"function": "lowercase"},
                {"function": "regex", "regex_pattern": "(paris|cold|puppy|four|east|ice|honey|green)"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match"}],
}


def score(model: str, arguments: dict[str, Any], task: dict[str, Any], *, as_chat: bool = False) -> dict[str, Any]:
    """The scores, and what was answered to each document."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    done: Any = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[ConfigurableTask(config=dict(task))],
        apply_chat_template=as_chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = [one["resps"] for one in done["samples"][task["task"]]]
    return {"scores": done["results"][task["task"]], "answers": samples}


def _text(answers: Any) -> str:
    return str(answers[0][0]).strip()


def main(url: str, name: str, folder: str) -> int:
    os.environ.setdefault("OPENAI_API_KEY", "none")
    served = {"model": name, "num_concurrent": 1, "tokenizer": folder}
    plain = {"pretrained": folder, "dtype": "float32", "device": "cpu"}
    pairs = {
        "local-completions": (
            score("local-completions", {**served, "base_url": f"{url}/completions"}, BY_LIKELIHOOD),
            score("hf", plain, BY_LIKELIHOOD),
        ),
        "local-chat-completions": (
            score("local-chat-completions", {**served, "base_url": f"{url}/chat/completions"}, AS_A_CHAT, as_chat=True),
            score("hf", plain, AS_A_CHAT, as_chat=True),
        ),
    }
    is_same = True
    for model, (ours, theirs) in pairs.items():
        numbers = {key: value for key, value in ours["scores"].items() if isinstance(value, float)}
        same = all(theirs["scores"].get(key) == value for key, value in numbers.items())
        if model == "local-chat-completions":  # greedy: the same texts, but for where they are cut
            same = same and [_text(one) for one in ours["answers"]] == [_text(one) for one in theirs["answers"]]
        is_same = is_same and same
        print(json.dumps({"model": model, "served": numbers, "same as plain Hugging Face": same}))
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
