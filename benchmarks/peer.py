"""The peer: `interp-engine` on its eager backend, in the virtual environment that `benchmarks.peer_setup` makes.

Loaded with `attn_implementation="sdpa"`, the quicker of its two. It has no SAEs: what it captures goes through the same
formula as the floor's. `PYTHON -m benchmarks.peer MODEL SAES`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from interp_engine import (  # pyright: ignore[reportMissingImports]  # it lives in the other environment
    AddSpec,
    SteeringSpec,
    capture,
    generate_stream,
    load_model,
    steer,
)

from benchmarks.child import NotOffered, Run, serve
from benchmarks.formula import Sae, pad, strongest

ONE_AT_A_TIME = (
    "without a GPU it generates one prompt at a time, and steering holds for the whole model as long as it is open"
)
GREEDY: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 0.0}


class Peer:
    packages = ("interp-engine", "torch", "transformers")

    def __init__(self, model: str, saes: str) -> None:
        self.model: Any = load_model(model, backend="eager", device="cpu", dtype="float32", attn_implementation="sdpa")
        self.saes = Sae.load_all(saes)

    def prepare(self, line: dict[str, Any]) -> Run:
        kinds = {
            "OneFeature": self._one_feature,
            "AllFeatures": self._all_features,
            "Generate": self._generations,
            "FirstToken": self._first_token,
        }
        return kinds[line["kind"]](line)

    def _one_feature(self, line: dict[str, Any]) -> Run:
        texts, at_a_time, layer = line["texts"], line["at_a_time"], line["layer"]
        parts = [texts[start : start + at_a_time] for start in range(0, len(texts), at_a_time)]
        batches = [pad([self._ids(text) for text in part], "right") for part in parts]

        def run() -> list[list[float]]:
            found: list[list[float]] = []
            for ids, mask in batches:
                resid = self._capture(ids, mask, [layer])[layer]
                values = self.saes[layer].one_feature(resid, line["index"])
                found += [row[1:n].tolist() for row, n in zip(values, mask.sum(1).tolist(), strict=True)]
            return found

        return run

    def _all_features(self, line: dict[str, Any]) -> Run:
        ids, mask = pad([self._ids(line["text"])], "right")

        def run() -> list[list[Any]]:
            resid = self._capture(ids, mask, line["layers"])
            acts = {layer: self.saes[layer].encode(resid[layer][0]) for layer in line["layers"]}
            return strongest(acts, line["n_results"])

        return run

    def _generations(self, line: dict[str, Any]) -> Run:
        if line["at_a_time"] > 1:
            raise NotOffered(ONE_AT_A_TIME)
        prompts = [(one, self._spec(one), torch.tensor([self._ids(one["text"])])) for one in line["prompts"]]

        def text(ids: torch.Tensor, spec: SteeringSpec | None) -> str:
            with self._steered(spec):
                steps = generate_stream(self.model, ids, max_tokens=line["n_tokens"], **GREEDY)
                return self._decode([step.token_id for step in steps])

        def run() -> list[list[str]]:
            return [
                [text(ids, spec if kind == "STEERED" else None) for kind in one["types"]] for one, spec, ids in prompts
            ]

        return run

    def _first_token(self, line: dict[str, Any]) -> Run:
        if line["others"]:
            raise NotOffered(ONE_AT_A_TIME)
        spec, ids = self._spec(line["prompt"]), torch.tensor([self._ids(line["prompt"]["text"])])

        def run() -> str:
            with self._steered(spec):
                return next(generate_stream(self.model, ids, max_tokens=line["n_tokens"], **GREEDY)).token_str

        return run

    def _ids(self, text: str) -> list[int]:
        return self.model.to_tokens(text)[0].tolist()

    def _decode(self, ids: Sequence[int]) -> str:
        return self.model.tokenizer.decode(ids, skip_special_tokens=True)

    def _capture(self, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """`[row, pos, d_model]` after each layer."""
        padded = None if mask.all() else mask
        cache = capture(self.model, ids, [f"resid_post.{layer}" for layer in layers], attention_mask=padded)
        return {layer: cache[f"resid_post.{layer}"] for layer in layers}

    def _spec(self, prompt: dict[str, Any]) -> SteeringSpec:
        wanted = prompt["steer"]
        return SteeringSpec.at(
            f"resid_post.{wanted['layer']}", AddSpec(torch.tensor(wanted["vector"]), wanted["strength"])
        )

    @contextmanager
    def _steered(self, spec: SteeringSpec | None) -> Iterator[None]:
        with ExitStack() as stack:
            if spec is not None:
                stack.enter_context(steer(self.model, spec))
            yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(lambda: Peer(*sys.argv[1:]))
