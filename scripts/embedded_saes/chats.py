"""Chats and stories sampled from the embedded model itself: modern topics that the other sources lack."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 20240611
BATCH = 32
MAX_NEW_TOKENS = 144
TEMPERATURE = 0.8

TOPICS = tuple(
    """
    pizza; baking bread; coffee; wine; vegetarian cooking; ice cream; street food; chocolate;
    football; basketball; tennis; swimming; running a marathon; chess; video games; board games;
    gardening; houseplants; trees; flowers; dogs; cats; horses; birds; whales; insects; dinosaurs;
    farming; bees; fishing; the ocean; rivers; mountains; deserts; weather; storms; climate change;
    earthquakes; volcanoes; the moon; space travel; planets; black holes; telescopes; physics;
    chemistry; biology; genetics; evolution; mathematics; geometry; statistics; probability;
    computers; programming in Python; databases; artificial intelligence; robots; smartphones; the
    internet; computer security; social media; electric cars; trains; airplanes; bicycles; ships;
    traffic; architecture; bridges; cities; villages; housing prices; money; banking; taxes;
    insurance; starting a business; marketing; job interviews; leadership; working from home;
    customer service; schools; teachers; university; exams; homework; learning languages; reading
    novels; poetry; writing; libraries; newspapers; movies; television; theatre; dancing; singing;
    guitar; classical music; jazz; painting; photography; museums; fashion; shoes; jewelry; health;
    sleep; exercise; yoga; headaches; hospitals; doctors; vaccines; dentists; mental health;
    anxiety; happiness; love; marriage; weddings; divorce; babies; parenting; grandparents;
    friendship; loneliness; death; religion; prayer; churches; philosophy; ethics; history; ancient
    Rome; Egypt; the Second World War; soldiers; revolutions; kings; democracy; elections; voting
    rights; police; crime; courts; lawyers; prisons; human rights; immigration; trade; factories;
    oil; nuclear energy; solar power; water supply; recycling; clothing; furniture; cleaning; moving
    house; travel; hotels; Paris; Japan; India; Africa; Brazil; China; New York; camping; beaches;
    skiing; magic; dragons; ghosts; detectives; pirates; superheroes; birthdays; Christmas; gifts;
    cooking for children; jokes; dreams; time
    """.replace("\n", " ").split(";")
)
TASKS = (
    "Explain {} to a beginner.",
    "Write a short story about {}.",
    "Give me practical advice about {}.",
    "Write a newspaper report about {}.",
    "What do people often get wrong about {}?",
    "Write a conversation between two friends about {}.",
)


def sample_chats(model_folder: Path, target: Path, tokens_wanted: int) -> None:
    """Append one JSON line per chat ({"topic", "prompt", "answer"}) to `target` until the budget is reached.

    A second call goes on behind the last complete batch.
    """
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    done = len(target.read_text(encoding="utf-8").splitlines()) if target.exists() else 0
    written, started = 0, time.monotonic()
    for number, batch in enumerate(_batches()):
        if number * BATCH < done:
            continue
        answers = _answer(model, tokenizer, [prompt for _, prompt in batch], SEED + number)
        with target.open("a", encoding="utf-8") as file:
            for (topic, prompt), answer in zip(batch, answers, strict=True):
                file.write(json.dumps({"topic": topic, "prompt": prompt, "answer": answer}) + "\n")
                written += len(tokenizer(answer)["input_ids"])
        print(f"chats: {written} tokens, {written / (time.monotonic() - started):.0f}/s", flush=True)
        if written >= tokens_wanted:
            return


def _batches() -> Iterator[list[tuple[str, str]]]:
    # One task after the other over all topics, so that an early stop still leaves every topic covered.
    pairs = [(topic.strip(), task.format(topic.strip())) for task in TASKS for topic in TOPICS]
    order = torch.randperm(len(TOPICS), generator=torch.Generator().manual_seed(SEED)).tolist()
    shuffled = [pairs[base + index] for base in range(0, len(pairs), len(TOPICS)) for index in order]
    for start in range(0, len(shuffled), BATCH):
        yield shuffled[start : start + BATCH]


@torch.inference_mode()
def _answer(model, tokenizer, prompts: list[str], seed: int) -> list[str]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(seed)
    out = model.generate(
        **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=TEMPERATURE, top_p=0.95, top_k=0
    )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
