"""Fits the embedded model's persona axis: what separates its answers in a role from its answers as an assistant.

`python scripts/fit_persona.py` has it answer questions under system prompts of both kinds, takes the mean of the
residual stream behind each of a few layers over every answer, and keeps the layer that separates best where it was
fitted. The card has what it separates on roles and questions that the fit has not seen.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from itertools import product
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from neuronpedia_inference.domain import ChatMessage, Numbers
from neuronpedia_inference.embedded import MODEL_ID, PERSONA_FOLDER
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.operations.persona import message_means
from neuronpedia_inference.persona import FACTS, TENSORS
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings

LAYERS = (8, 12, 15, 18, 22)
N_TOKENS, AT_ONCE, WIDTH = 32, 12, 120
TITLE, NAME = "- Role-playing ↔️ + Assistant-like", "assistant"
ASSISTANTS = ("You are a helpful AI assistant.", "You are an AI assistant. Answer clearly and briefly.", "")
ROLES = (
    "You are a pirate captain. You speak like a pirate and never leave your role.",
    "You are a ghost who haunts an old castle. You moan and never leave your role.",
    "You are a medieval knight who serves his king. You never leave your role.",
    "You are a wizard who speaks in riddles. You never leave your role.",
    "You are a cat. You think only of food and sleep and never leave your role.",
    "You are a grumpy old fisherman telling tales. You never leave your role.",
)
QUESTIONS = (
    "What is the capital of France?",
    "How do I boil an egg?",
    "What did you do yesterday?",
    "Why is the sky blue?",
    "Can you help me with my homework?",
    "Tell me about yourself.",
)
UNSEEN_ASSISTANTS = ("You are a polite assistant who gives correct answers.", "Be a useful assistant.")
UNSEEN_ROLES = (
    "You are a space alien who visits Earth for the first time. You never leave your role.",
    "You are a vampire who lives in the dark. You never leave your role.",
    "You are a cowboy in the Wild West. You never leave your role.",
    "You are Shakespeare, and you speak in verse. You never leave your role.",
)
UNSEEN_QUESTIONS = (
    "What should I eat tonight?",
    "How does a car work?",
    "What are you afraid of?",
    "Who is your friend?",
)
Means = dict[int, Numbers]
"""By layer, [answer, d_model]."""


async def means(systems: Sequence[str], questions: Sequence[str], rt: Runtime) -> Means:
    """Of the answers to every question under every system prompt."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(system: str, question: str) -> list[Numbers]:
        chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        async with turn:
            body: dict[str, Any] = {"prompt": chat[0 if system else 1 :], "max_new_tokens": N_TOKENS, "compare": False}
            told = await answer(by_name["steer"], body, rt)
            messages = [ChatMessage(one["role"], one["content"]) for one in told["steered"]["messages"]]
            return [(await message_means(messages, layer, rt))[-1] for layer in LAYERS]

    found = await asyncio.gather(*(one(*pair) for pair in product(systems, questions)))
    return {layer: np.stack([each[place] for each in found]) for place, layer in enumerate(LAYERS)}


def axis_of(assistants: Numbers, roles: Numbers) -> tuple[Numbers, Numbers]:
    """The point between both means, and the direction to the assistants', at unit length: [d_model] each."""
    to, away = assistants.mean(axis=0), roles.mean(axis=0)
    return (to + away) / 2, (to - away) / np.linalg.norm(to - away)


def separation(assistants: Numbers, roles: Numbers) -> dict[str, float]:
    """Of values on the axis: how often an assistant's is above a role's, and on the right side of 0."""
    right = np.concatenate([assistants > 0, roles < 0])
    return {"auc": float((assistants[:, None] > roles).mean()), "accuracy": float(right.mean())}


def card(facts: Mapping[str, Any], rows: Sequence[str]) -> str:
    seen, unseen = facts["fitted"], facts["unseen"]
    about = (
        f"`{TITLE}`, at `blocks.{facts['layer']}.hook_resid_post`, made by `scripts/fit_persona.py`: the model's own "
        f"greedy answers of {N_TOKENS} tokens to {len(QUESTIONS)} questions, as an assistant ({len(ASSISTANTS)} system "
        f"prompts, one of them none) and in a role ({len(ROLES)} system prompts). The axis goes from the mean of the "
        f"roles' answers to that of the assistants', and 0 lies between them. Layers {', '.join(map(str, LAYERS))} "
        "were tried, and the one kept separates best where it was fitted."
    )
    limits = (
        f"These are {len(UNSEEN_QUESTIONS)} short answers to each prompt, by one small model. The axis says how an "
        "answer is written, not what the model was told. The published use is a `floor` along "
        f"`axis:{NAME}`, here at {facts['floors'][0]:.4g}, the lower quartile of the assistants' h·v̂ where it was "
        "fitted."
    )
    return "\n".join(
        [
            f"# Persona axis of {MODEL_ID}\n",
            *wrap(about, WIDTH),
            "\n| answers | an assistant's is above a role's | on the right side of 0 |",
            "| --- | --- | --- |",
            f"| fitted | {seen['auc']:.2f} | {seen['accuracy']:.2f} |",
            f"| other roles, assistants and questions | {unseen['auc']:.2f} | {unseen['accuracy']:.2f} |\n",
            "Mean value on the unseen ones:\n",
            "| system prompt | value |",
            "| --- | --- |",
            *rows,
            "",
            *wrap(limits, WIDTH),
            "",
        ]
    )


async def main() -> None:
    rt = Runtime.load(Settings.read(model_id=MODEL_ID, sae_sets=[], token_limit=400), print)
    sides = [
        await means(systems, questions, rt)
        for systems, questions in (
            (ASSISTANTS, QUESTIONS),
            (ROLES, QUESTIONS),
            (UNSEEN_ASSISTANTS, UNSEEN_QUESTIONS),
            (UNSEEN_ROLES, UNSEEN_QUESTIONS),
        )
    ]
    rt.close()
    axes = {layer: axis_of(sides[0][layer], sides[1][layer]) for layer in LAYERS}

    def values(side: Means, layer: int) -> Numbers:
        mean, axis = axes[layer]
        return (side[layer] - mean) @ axis

    fitted = {layer: separation(values(sides[0], layer), values(sides[1], layer)) for layer in LAYERS}
    layer = max(LAYERS, key=lambda one: (fitted[one]["auc"], fitted[one]["accuracy"], -one))
    unseen = [values(side, layer) for side in sides[2:]]
    mean, axis = axes[layer]
    facts = {
        "layer": layer,
        "titles": [TITLE],
        "names": [NAME],
        "floors": [float(np.quantile(sides[0][layer] @ axis, 0.25))],
        "is_scaled": False,
        "fitted": fitted[layer],
        "unseen": separation(*unseen),
    }
    systems = (*UNSEEN_ASSISTANTS, *UNSEEN_ROLES)
    by_system = np.concatenate(unseen).reshape(len(systems), -1).mean(axis=1)
    rows = [f"| {system} | {value:+.2f} |" for system, value in zip(systems, by_system, strict=True)]
    PERSONA_FOLDER.mkdir(exist_ok=True)
    tensors = {"mean": torch.from_numpy(mean), "axes": torch.from_numpy(axis)[None]}
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, PERSONA_FOLDER / TENSORS)
    (PERSONA_FOLDER / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (PERSONA_FOLDER / "README.md").write_text(card(facts, rows), encoding="utf-8")
    print(json.dumps({layer: fitted[layer] for layer in LAYERS}), facts["unseen"])


if __name__ == "__main__":
    asyncio.run(main())
