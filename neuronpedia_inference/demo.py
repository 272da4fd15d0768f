"""The three views of `neuronpedia-inference demo`, drawn from the same operations that the server offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from neuronpedia_inference.client.terminal import Strip, colour, visible
from neuronpedia_inference.embedded import SteeringExample, steering_examples
from neuronpedia_inference.operations import answer, by_name

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

SENTENCE = "The judge told the court that the army had burned the old church."
SOURCE = "15-res-4k"
FEATURES_PER_TOKEN = 2
BAR = 6


async def show(console: Console, runtime: Runtime, *, n_tokens: int) -> None:
    """Print the three views."""
    top = await _ask(runtime, "top_k", prompt=SENTENCE, source=SOURCE, top_k=FEATURES_PER_TOKEN, rank_by="relative")
    console.print(top_features(top["results"][0]))
    one = await _ask(runtime, "activations", prompt=SENTENCE, source=SOURCE, num_results=1, rank_by="relative")
    console.print(heat_strip(one["results"][0]))
    console.print(
        _heading("The same prompt, plain and steered", "a feature's direction is added while the model writes")
    )
    for example in steering_examples()[:3]:
        console.print(side_by_side(example, await _steered(runtime, example, n_tokens)))


async def _ask(runtime: Runtime, name: str, **body: Any) -> dict[str, Any]:
    return await answer(by_name[name], body, runtime)


async def _steered(runtime: Runtime, example: SteeringExample, n_tokens: int) -> dict[str, Any]:
    feature = {"source": example.source, "index": example.index, "strength": example.strength}
    return await _ask(
        runtime,
        "steer",
        prompt=example.prompt,
        features=[feature],
        method=example.steer_method,
        max_new_tokens=n_tokens,
    )


def top_features(result: dict[str, Any]) -> Group:
    """A row per token: the features that are most peculiar to it, with their labels."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", expand=True)
    positions = result["positions"][result["has_bos"] :]
    longest = max(cell_len(visible(position["token"])) for position in positions)
    table.add_column("token", style="bold", no_wrap=True, min_width=min(longest, 16))
    for rank in ("first feature", "second"):
        table.add_column(rank, ratio=1, no_wrap=True)
        table.add_column("", no_wrap=True, min_width=7 + BAR)
    values = [f["activation_value"] for p in positions for f in p["top_features"]]
    most = max(values, default=1.0) or 1.0
    for position in positions:
        cells = [_feature_cells(feature, most) for feature in position["top_features"]]
        table.add_row(Text(visible(position["token"])), *(cell for pair in cells for cell in pair))
    note = f"source {result['source']}, what is rare and near its maximum first"
    return Group(_heading("What the model sees in each token", note), table)


def _feature_cells(feature: dict[str, Any], most: float) -> tuple[Text, Text]:
    """`1234 label`, and how strongly it fires."""
    value = feature["activation_value"]
    filled = round(BAR * value / most)
    bar = Text("█" * filled, style=colour(value / most)) + Text("░" * (BAR - filled), style="dim")
    name = Text.assemble((f"{feature['feature_index']:>4} ", "dim"), feature["label"] or "no label")
    return name, Text(f"{value:6.1f} ") + bar


def heat_strip(result: dict[str, Any]) -> Group:
    """The sentence with one feature's activation as colour, and as a bar under each token."""
    feature = result["features"][0]
    title = f"{feature['label'] or 'no label'} · {feature['source']} #{feature['index']}"
    peak = f"peak {feature['max_value']:.1f} on {visible(result['tokens'][feature['max_value_index']])!r}"
    written = slice(int(result["has_bos"]), None)  # without the token that nobody wrote
    strip = Strip(result["tokens"][written], feature["values"][written])
    return Group(_heading("One feature over the sentence", f"{title}, {peak}"), strip, Text(""))


def side_by_side(example: SteeringExample, texts: dict[str, Any]) -> Panel:
    """Two columns: what the model writes by itself, and what it writes when steered."""
    table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
    table.add_column("plain", ratio=1)
    table.add_column(f"steered, strength {example.strength:g}", ratio=1, header_style="bold dark_orange")
    prompt = (example.prompt, "dim")
    plain, steered = (texts[side]["text"] for side in ("default", "steered"))
    table.add_row(Text.assemble(prompt, plain), Text.assemble(prompt, (steered, "dark_orange")))
    title = Text(f" {example.label} · {example.source} #{example.index} ")
    return Panel(table, title=title, title_align="left", box=box.ROUNDED, border_style="dim")


def _heading(title: str, note: str) -> Text:
    return Text("\n") + Text(title, style="bold") + Text(f"  {note}", style="dim") + Text("\n")
