"""Commands about what could be served: models with their SAEs, one SAE, and the memory that all of it needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from neuronpedia_inference.cli.options import ModelOption, SetOption, SetsOption, settings_of
from neuronpedia_inference.cli.output import console, facts, is_piped, line, print_json, tab_separated, table

if TYPE_CHECKING:
    from neuronpedia_inference.inventory import Sae, SaeSet

SET_COLUMNS = (
    "model",
    "set",
    "saes",
    "width",
    "kind",
    "hook",
    "canonical",
    "default",
    "of",
    "bytes on disk",
    "bytes resident",
    "refused",
    "limited",
)
SAE_COLUMNS = (
    "model",
    "set",
    "name",
    "release",
    "sae_id",
    "hook",
    "width",
    "kind",
    "bytes on disk",
    "bytes resident",
    "refused",
    "limited",
)

NOT_HERE = "unknown: not on this machine"

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def models(
    model_id: Annotated[str | None, typer.Argument(help="A model; without one, all models are listed.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List each SAE, not sets alone.")] = False,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """List the models that have SAEs, or the source sets of one model.

    These are the embedded model and those in SAELens's directory: what MODEL_ID and SAE_SETS can be. Sets of the model
    that it was finetuned from are marked with its name, and what cannot be served has its reason. With --all and no
    model, every SAE of the directory is listed once. Bytes are those of files on this machine, and what they take in
    SAE_DTYPE; those of other SAEs are unknown, for nothing is asked of the hub. Piped, lines are tab-separated.
    """
    from neuronpedia_inference import inventory
    from neuronpedia_inference.saes.catalogue import known_models

    dtype = settings_of(set_).sae_dtype
    if model_id is not None:
        found = {model_id: inventory.sets_of(model_id, dtype)}
    elif every:
        found = inventory.directory(dtype)
    else:
        found = {model: inventory.sets_of(model, dtype) for model in known_models()}
    if as_json:
        print_json(inventory.to_json(found, with_saes=every or model_id is not None))
    elif every:
        _show_saes(found)
    elif model_id is None:
        _show_models(found)
    else:
        _show_sets(model_id, found[model_id])


def sae(
    source: Annotated[
        str, typer.Argument(help="A source's name, `model/source`, or an address as SAE_SETS takes them.")
    ],
    model_id: ModelOption = None,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Show one SAE: where it is, where it reads, how large it is, and what of it is not served.

    Nothing is asked of the hub. Example: [bold]neuronpedia-inference sae gemma-2-2b/20-gemmascope-res-16k[/]
    """
    from neuronpedia_inference.inventory import find

    found = find(source, settings_of(set_, model_id=model_id))
    if as_json:
        print_json(found.to_json() | {"address": found.spec.address})
        return
    about = _facts(found)
    if is_piped():
        tab_separated(tuple(about), [tuple(about.values())])
    else:
        facts(about)


def _facts(found: Sae) -> dict[str, str]:
    spec = found.spec
    return {
        "name": spec.name,
        "set": spec.source_set,
        "of": spec.base or (spec.listed.model if spec.listed else ""),
        "address": spec.address,
        "neuronpedia": spec.neuronpedia_id or "",
        "repository": f"{spec.repo}/{spec.path}" if spec.repo else "",
        "hook": found.hook or "",
        "width": _number(found.width),
        "kind": found.kind,
        "bytes on disk": _number(found.disk_bytes) or NOT_HERE,
        "bytes resident": _number(found.resident_bytes) or NOT_HERE,
        "refused": found.refused or "",
        "limited": found.limited or "",
    }


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _show_models(found: dict[str, tuple[SaeSet, ...]]) -> None:
    rows = []
    for model, sets in found.items():
        default = next((one.name for one in sets if one.offered.is_default), "")
        rows.append((model, str(len(sets)), str(sum(len(one.saes) for one in sets)), default))
    columns = ("model", "sets", "SAEs", "without SAE_SETS")
    if is_piped():
        tab_separated(columns, rows)
    else:
        table(columns, rows)


def _show_saes(found: dict[str, tuple[SaeSet, ...]]) -> None:
    if is_piped():
        tab_separated(SAE_COLUMNS, [row for model, sets in found.items() for row in _sae_rows(model, sets)])
        return
    for model, sets in found.items():
        for one in sets:
            _print(f"[bold]{model}  {one.name}[/]{_marks(one)}")
            for each in one.saes:
                reason = each.refused or each.limited
                facts = (each.kind, _width(each.width), each.hook or "", _size(each.disk_bytes), reason or "")
                _print(f"  {each.spec.name}  [dim]{', '.join(filter(None, facts))}[/]")


def _sae_rows(model: str, sets: tuple[SaeSet, ...]) -> Iterator[tuple[str, ...]]:
    for one in sets:
        for each in one.saes:
            spec, sizes = each.spec, (_number(each.disk_bytes), _number(each.resident_bytes))
            about = (spec.name, spec.release or "", spec.sae_id or "", each.hook or "", _number(each.width), each.kind)
            yield (model, one.name, *about, *sizes, each.refused or "", each.limited or "")


def _show_sets(model: str, sets: tuple[SaeSet, ...]) -> None:
    if is_piped():
        tab_separated(SET_COLUMNS, [_set_row(model, one) for one in sets])
        return
    best = [one for one in sets if one.offered.is_canonical] or list(sets)
    for one in sorted(best, key=lambda one: not one.offered.is_default):
        _show_set(one)
    rest = [one for one in sets if one not in best]
    if rest:
        n_saes = sum(len(one.saes) for one in rest)
        _print(f"{len(rest)} more sets with {n_saes} SAEs are not on Neuronpedia under a set's name: --all lists each.")


def _show_set(one: SaeSet) -> None:
    first, last = one.saes[0].spec.name, one.saes[-1].spec.name
    here = sum(each.disk_bytes is not None for each in one.saes)
    resident = f", {_size(one.resident_bytes)} in memory" if one.resident_bytes is not None else ""
    on_disk = f"{here} on disk, {_size(one.disk_bytes)}{resident}" if here else "not on this machine"
    shape = (one.kinds, _width(one.widths), one.places)
    _print(f"[bold]{one.name}[/]{_marks(one)}")
    _print(f"  {len(one.saes)} SAEs: {first} to {last}" if last != first else f"  {first}")
    _print(f"  {', '.join(filter(None, shape))}; {on_disk}")
    _print(f"  [dim]{one.offered.release}[/]")
    for reason, count in one.offered.refused.items():
        _print(f"  {count} not served: {reason}")
    for reason, count in one.offered.limited.items():
        _print(f"  {count} with a limit: {reason}")


def _set_row(model: str, one: SaeSet) -> tuple[str, ...]:
    offered = one.offered
    return (
        model,
        one.name,
        str(len(one.saes)),
        one.widths,
        one.kinds,
        one.places,
        "yes" if offered.is_canonical else "",
        "yes" if offered.is_default else "",
        offered.base or "",
        str(one.disk_bytes),
        _number(one.resident_bytes),
        "; ".join(f"{count}: {reason}" for reason, count in offered.refused.items()),
        "; ".join(f"{count}: {reason}" for reason, count in offered.limited.items()),
    )


def _marks(one: SaeSet) -> str:
    offered = one.offered
    marks = (
        f"of {offered.base}" if offered.base else "",
        "canonical" if offered.is_canonical else "",
        "served without SAE_SETS" if offered.is_default else "",
    )
    return "".join(f"  {mark}" for mark in marks if mark)


def _width(width: int | str | None) -> str:
    return f"{width} features" if width else ""


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return ""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def _print(text: str) -> None:
    console().print(text, highlight=False, soft_wrap=False)


def plan(
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    set_: SetOption = None,
) -> None:
    """Count the memory that a model and its SAEs need, and name the cheapest GPU of Modal that has it.

    Nothing is loaded. Local folders and the embedded model are counted from their files, others from the hub's
    metadata. SAEs count as they are once all features of all have been asked for, within MAX_LOADED_SAES and
    SAE_MEMORY_GIB; features that are read, steered and watched one by one need none of them in memory, which the last
    two columns are for. The headroom is a rule of thumb. Costs are of these GPUs, from a dated table of prices.
    """
    from neuronpedia_inference.memory import GIB, sizes

    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets)
    counted = sizes(settings)
    rows, costs_by_gpu = [], {}
    for dtypes in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        needs = counted.needs(*dtypes)
        least = needs.one_by_one
        parts = (needs.weights, needs.saes, needs.cache, needs.headroom, needs.total)
        sizes_in_gib = [f"{part / GIB:.2f}" for part in parts]
        alone = (f"{least.total / GIB:.2f}", least.gpu or "more than one")
        rows.append((*dtypes, *sizes_in_gib, needs.gpu or "more than one", *alone))
        for gpu in filter(None, (needs.gpu, least.gpu)):
            costs_by_gpu.setdefault(gpu, needs.weights)
    line(f"{settings.weights_id}: {counted.parameters:,} parameters, {counted.n_sources} SAEs; memory in GiB")
    table(
        ("MODEL_DTYPE", "SAE_DTYPE", "weights", "SAEs", "cache", "headroom", "total", "GPU", "one by one", "GPU"), rows
    )
    _cost_table(costs_by_gpu)


def _cost_table(bytes_read: dict[str, int]) -> None:
    """bytes_read: weights, by GPU."""
    from neuronpedia_inference.prices import costs, price_of

    rows = []
    for gpu, n_bytes in bytes_read.items():
        price = price_of(gpu)
        if price is not None:
            one = costs(price.usd_per_hour, n_bytes)
            amounts = (one.hour, one.idle_day, one.cold_start, one.features, one.steered_texts)
            rows.append(
                (gpu, *(f"{amount:.4f}" if amount < 0.1 else f"{amount:.2f}" for amount in amounts), price.seen)
            )
    line("US dollars for the GPU; a thousand requests at the pace of the benchmark's CPU: no GPU has been measured")
    columns = ("GPU", "hour", "idle day", "cold start", "1000 features", "1000 steered texts", "price seen")
    table(columns, rows)
