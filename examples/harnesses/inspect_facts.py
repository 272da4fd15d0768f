"""A small task of Inspect, asked through a server by its OpenAI provider, and of plain Hugging Face: the same scores.

    pip install inspect-ai openai torch transformers
    python examples/harnesses/inspect_facts.py http://127.0.0.1:5002/v1 smollm2-135m-instruct FOLDER_OF_THE_WEIGHTS

`facts.jsonl` beside this file is the task.
"""

# Inspect is no dependency of this project.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts.jsonl")
ASKED = "Finish the sentence with one word. {question}"
MAX_TOKENS = 12


def by_inspect(url: str, name: str) -> tuple[float, list[str]]:
    """The accuracy, and what was answered to each question."""
    from inspect_ai import Task
    from inspect_ai import eval as evaluate
    from inspect_ai.dataset import Sample, json_dataset
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    def sample(fact: dict[str, Any]) -> Sample:
        return Sample(input=ASKED.format(**fact), target=fact["target"])

    task = Task(dataset=json_dataset(str(FACTS), sample), solver=generate(), scorer=includes())
    [log] = evaluate(
        task,
        model=f"openai/{name}",
        model_base_url=url,
        model_args={"api_key": "none", "responses_api": False},
        extra_body={"temperature": 0},  # `temperature` itself it leaves out for models that it does not know
        max_tokens=MAX_TOKENS,
        display="none",
        log_dir=tempfile.mkdtemp(),
    )
    assert log.status == "success", log.error
    assert log.results
    assert log.samples
    return log.results.scores[0].metrics["accuracy"].value, [one.output.completion for one in log.samples]


def by_hugging_face(folder: str) -> tuple[float, list[str]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    answers = []
    for fact in facts:
        chat = [{"role": "user", "content": ASKED.format(**fact)}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    right = [fact["target"].lower() in answer.lower() for fact, answer in zip(facts, answers, strict=True)]
    return sum(right) / len(right), answers


def main(url: str, name: str, folder: str) -> int:
    served, plain = by_inspect(url, name), by_hugging_face(folder)
    print(json.dumps({"served": served[0], "plain Hugging Face": plain[0], "same answers": served[1] == plain[1]}))
    return 0 if served == plain else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
