"""`replay`: a receipt, run again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from neuronpedia_inference.cli.loaded import service
from neuronpedia_inference.cli.options import DeviceOption, ModelOption, SetOption, SetsOption, settings_of
from neuronpedia_inference.cli.output import line, print_json
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.exits import DIFFERS, NOT_COMPARABLE


def replay(
    file: Annotated[str, typer.Argument(help="A receipt, or an answer that has one, as JSON; - for standard input.")],
    url: Annotated[str | None, typer.Option(help="Ask a running server, such as http://127.0.0.1:5002.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All differences, as JSON.")] = False,
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Run a receipt again, and name the first token or number that differs.

    Receipts come with `"receipt": true` of [bold]steer[/] and [bold]sweep[/]. What went in is compared first (prompts,
    weights, edits, sampling), then the texts and what each edit did.

    Exit code 0: no difference. 4: something differs. 5: texts or numbers differ, and so do circumstances (other
    weights, versions, device, or a receipt that is not reproducible), so that the two cannot be compared.
    """
    from neuronpedia_inference.client.replays import receipt_in

    receipt = receipt_in(_json_in(file))
    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    with service(url, settings) as asked:
        found = asked.replay(receipt)
    if as_json:
        differences = [{"where": one.where, "was": one.was, "now": one.now} for one in found.differences]
        print_json(
            {
                "same": found.is_same,
                "comparable": found.is_comparable,
                "differences": differences,
                "circumstances": list(found.circumstances),
                "not_compared": list(found.not_compared),
            }
        )
    else:
        line(str(found))
    if not found.is_same:
        raise SystemExit(DIFFERS if found.is_comparable else NOT_COMPARABLE)


def _json_in(file: str) -> Any:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidRequest(f"{file}: {exc}") from None
