"""`features`, `search`, `steer`, `sweep` and `chat`: what one does most, by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuronpedia_inference.cli.loaded import service
from neuronpedia_inference.cli.options import DeviceOption, ModelOption, SetOption, SetsOption, settings_of
from neuronpedia_inference.cli.output import console, is_piped, line, print_json, tab_separated, working
from neuronpedia_inference.errors import InvalidRequest

if TYPE_CHECKING:
    from neuronpedia_inference.client.results import Result
    from neuronpedia_inference.client.session import Client
    from neuronpedia_inference.client.steering import FeatureName, Steering
    from neuronpedia_inference.client.written import Steered

UrlOption = Annotated[str | None, typer.Option(help="Ask a running server, such as http://127.0.0.1:5002.")]
SourceOption = Annotated[str | None, typer.Option(help="A source, such as 15-res-4k.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON, with all numbers.")]
AddOption = Annotated[
    list[str] | None,
    typer.Option("--add", "-a", metavar="FEATURE@STRENGTH", help="Add a feature, 15-res-4k/1113@70. Repeatable."),
]
ClampOption = Annotated[
    list[str] | None,
    typer.Option("--clamp", metavar="FEATURE@VALUE", help="Set a feature's activation, 15-res-4k/1113@8. Repeatable."),
]
WatchOption = Annotated[
    list[str] | None,
    typer.Option("--watch", "-w", metavar="FEATURE", help="Show where a feature fires. Repeatable."),
]
TokensOption = Annotated[int | None, typer.Option(min=1, help="Tokens to write at the most.")]
TemperatureOption = Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest token.")]
SeedOption = Annotated[int | None, typer.Option(help="Of what is drawn.")]


def features(
    text: Annotated[str, typer.Argument(help="A text, or - to read it from standard input.")],
    source: SourceOption = None,
    limit: LimitOption = None,
    rank_by: Annotated[
        str | None, typer.Option(help="relative puts first what is peculiar to the text; or activation.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Show the features that fire most on a text, and where.

    Piped, a line for each feature, tab-separated.

    Example: [bold]neuronpedia-inference features "The court found him guilty." --source 15-res-4k[/]
    """
    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    with service(url, settings) as asked, working("Reading"):
        found = asked.features(_text(text), source, num_results=limit, rank_by=rank_by)
    _show(found, as_json=as_json)


def search(
    words: Annotated[list[str], typer.Argument(help="Words of labels and contexts.")],
    source: SourceOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Find features by words. Piped, a line for each, tab-separated.

    Example: [bold]neuronpedia-inference search moon orbit[/]
    """
    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    with service(url, settings) as asked, working("Searching"):
        found = asked.search(" ".join(words), source, limit=limit)
    _show(found, as_json=as_json)


def steer(
    prompt: Annotated[str, typer.Argument(help="What the text begins with, or - to read it from standard input.")],
    add: AddOption = None,
    clamp: ClampOption = None,
    watch: WatchOption = None,
    tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Write a text steered, beside what the model writes by itself.

    Example: [bold]neuronpedia-inference steer "The most important thing is" -a 15-res-4k/1113@70[/]
    """
    steering, watched = _steering(add, clamp), _features(watch)
    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    drawn = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed}
    with service(url, settings) as asked, working("Writing"):
        written = asked.steer(_text(prompt), steering, watch=watched or None, **drawn)
    _show(written, as_json=as_json)


def sweep(
    prompt: Annotated[str, typer.Argument(help="What the texts begin with, or - to read it from standard input.")],
    feature: Annotated[str, typer.Argument(help="The feature that is added, 15-res-4k/1113.")],
    strengths: Annotated[str, typer.Option(help="Numbers between commas.")] = "20,40,80",
    tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Write the same text steered by a feature at several strengths, and plain (0).

    Example: [bold]neuronpedia-inference sweep "I think that" 15-res-4k/1113 --strengths 20,40,80[/]
    """
    [named], numbers = _features([feature]), _numbers(strengths)
    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    drawn = {"max_new_tokens": tokens, "temperature": temperature, "seeds": None if seed is None else [seed]}
    with service(url, settings) as asked, working("Writing"):
        found = asked.sweep(_text(prompt), named, numbers, **drawn)
    _show(found, as_json=as_json)


def chat(
    add: AddOption = None,
    clamp: ClampOption = None,
    watch: WatchOption = None,
    tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    url: UrlOption = None,
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Talk to the model, steered or not, line by line; the end of the input (Ctrl-D) ends it.

    Below each answer stands where the watched features fire in it: those of --watch, else those that steer.

    Example: [bold]neuronpedia-inference chat -a 15-res-4k/1113@40[/]
    """
    steering = _steering(add, clamp)
    watched = _features(watch) or [_amount("", word)[0] for word in (*(add or ()), *(clamp or ()))]
    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    drawn = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed, "watch": watched or None}
    with service(url, settings) as asked:
        _talk(asked, steering, drawn)


def _talk(asked: Client, steering: Steering, drawn: dict[str, Any]) -> None:
    from neuronpedia_inference.client.session import turns_after

    turns: list[dict[str, str]] = []
    for said in _lines():
        turns.append({"role": "user", "content": said})
        answer = _written(asked.stream(turns, steering, compare=False, **drawn))
        if answer is not None:
            turns = turns_after(turns, answer)


def _written(events: Iterator[Steered]) -> Steered | None:
    """The answer, printed while it comes, with what was watched."""
    last, shown = None, 0
    for last in events:
        text = last.steered.text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    line("")
    if last is not None and last.steered.watch is not None and not is_piped():
        console().print(last.answer_strips())
    return last


def _lines() -> Iterator[str]:
    """What is typed, without what says nothing."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        said = sys.stdin.readline()
        if not said:
            return
        if said.strip():
            yield said.strip()


def _text(given: str) -> str:
    return sys.stdin.read() if given == "-" else given


def _steering(add: Sequence[str] | None, clamp: Sequence[str] | None) -> Steering:
    """Raises InvalidRequest for what is no feature with an amount."""
    from neuronpedia_inference.client.steering import Steering

    steering = Steering()
    for word in add or ():
        feature, amount = _amount("--add", word)
        steering = steering + feature @ amount
    for word in clamp or ():
        feature, amount = _amount("--clamp", word)
        steering = steering + feature.clamp(amount)
    return steering


def _amount(option: str, word: str) -> tuple[FeatureName, float]:
    name, _, amount = word.rpartition("@")
    try:
        return _features([name])[0], float(amount)
    except ValueError:
        raise InvalidRequest(f"{option} {word}: write source/index@number, such as 15-res-4k/1113@70") from None


def _numbers(words: str) -> list[float]:
    """Raises InvalidRequest."""
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise InvalidRequest(f"--strengths {words}: write numbers between commas, such as 20,40,80") from None


def _features(names: Sequence[str] | None) -> list[FeatureName]:
    from neuronpedia_inference.client.steering import FeatureName

    try:
        return [FeatureName.read(name) for name in names or ()]
    except ValueError as exc:
        raise InvalidRequest(str(exc)) from None


def _show(found: Result, *, as_json: bool) -> None:
    if as_json:
        import json

        print_json(json.loads(found.to_json())["value"])
    elif is_piped():
        rows = found.cells()
        tab_separated(tuple(rows[0]) if rows else (), [[_cell(one) for one in row.values()] for row in rows])
    else:
        console().print(found)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
