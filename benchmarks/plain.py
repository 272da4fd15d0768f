"""The floor: Hugging Face with hooks written by hand, the least that the same work can cost here.

It knows nothing of this project and gets its token ids beforehand. `python -m benchmarks.plain MODEL SAES`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.child import NotOffered, Run, serve
from benchmarks.formula import Sae, pad, strongest

Hook = Callable[[torch.Tensor], torch.Tensor | None]


class StopError(Exception):
    """Ends a forward pass at the hook."""


class Plain:
    packages = ("torch", "transformers")

    def __init__(self, model: str, saes: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.saes = Sae.load_all(saes)

    def prepare(self, line: dict[str, Any]) -> Run:
        kinds = {
            "FullForward": self._full_forward,
            "OneFeature": self._one_feature,
            "AllFeatures": self._all_features,
            "Generate": self._generations,
            "FirstToken": self._first_token,
        }
        return kinds[line["kind"]](line)

    def _full_forward(self, line: dict[str, Any]) -> Run:
        ids = torch.tensor([self._ids(line["text"])])

        def run() -> str:
            with torch.inference_mode():
                return self.tokenizer.decode(self.model(ids, use_cache=False).logits[0, -1].argmax())

        return run

    def _one_feature(self, line: dict[str, Any]) -> Run:
        batches = [self._batch(part, "right") for part in _parts(line["texts"], line["at_a_time"])]
        sae, layer, index = self.saes[line["layer"]], line["layer"], line["index"]

        def run() -> list[list[float]]:
            found: list[list[float]] = []
            with torch.inference_mode():
                for ids, mask in batches:
                    values = sae.one_feature(self._resid(ids, mask, [layer])[layer], index)
                    found += [row[1:n].tolist() for row, n in zip(values, mask.sum(1).tolist(), strict=True)]
            return found

        return run

    def _all_features(self, line: dict[str, Any]) -> Run:
        ids, mask = self._batch([line["text"]], "right")
        saes = {layer: self.saes[layer] for layer in line["layers"]}

        def run() -> list[list[Any]]:
            with torch.inference_mode():
                resid = self._resid(ids, mask, list(saes))
                return strongest({n: sae.encode(resid[n][0]) for n, sae in saes.items()}, line["n_results"])

        return run

    def _generations(self, line: dict[str, Any]) -> Run:
        batches = [self._rows(part) for part in _parts(line["prompts"], line["at_a_time"])]

        def run() -> list[list[str]]:
            return [texts for batch in batches for texts in self._generate(*batch, line["n_tokens"])]

        return run

    def _first_token(self, line: dict[str, Any]) -> Run:
        if line["others"]:
            raise NotOffered("a call of `generate` ends before the next begins")
        _, ids, _, edits = self._rows([line["prompt"]])

        def run() -> str:
            with torch.inference_mode(), self._edited(edits):
                return self.tokenizer.decode(self.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

        return run

    def _ids(self, text: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.tokenizer(text, add_special_tokens=False).input_ids]

    def _batch(self, texts: Sequence[str], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, `[row, pos]`."""
        return pad([self._ids(text) for text in texts], side)

    def _resid(self, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """`[row, pos, d_model]` after each layer; nothing behind the highest runs."""
        seen: dict[int, torch.Tensor] = {}

        def see(layer: int) -> Hook:
            def hook(output: torch.Tensor) -> None:
                seen[layer] = output
                if layer == max(layers):
                    raise StopError

            return hook

        # One row needs no mask, and attention is quicker without.
        padded = None if mask.all() else mask
        with ExitStack() as stack, suppress(StopError):
            for layer in layers:
                stack.enter_context(hooked(self.model.model.layers[layer], see(layer)))
            self.model(ids, attention_mask=padded, use_cache=False)
        return seen

    def _rows(self, prompts: Sequence[dict[str, Any]]) -> tuple[list[int], torch.Tensor, torch.Tensor, dict[int, Any]]:
        """Rows per prompt, ids, mask, and per steered layer what is added: `[row, 1, d_model]`."""
        rows = [(one, kind) for one in prompts for kind in one["types"]]
        ids, mask = self._batch([one["text"] for one, _ in rows], "left")
        edits: dict[int, torch.Tensor] = {}
        for place, (one, kind) in enumerate(rows):
            if kind == "STEERED":
                steer = one["steer"]
                table = edits.setdefault(steer["layer"], torch.zeros(len(rows), 1, len(steer["vector"])))
                table[place] = steer["strength"] * torch.tensor(steer["vector"])
        return [len(one["types"]) for one in prompts], ids, mask, edits

    def _generate(
        self, counts: list[int], ids: torch.Tensor, mask: torch.Tensor, edits: dict[int, Any], n_tokens: int
    ) -> Iterator[list[str]]:
        with torch.inference_mode(), self._edited(edits):
            grown = self.model.generate(ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False)
        texts = self.tokenizer.batch_decode(grown[:, ids.shape[1] :], skip_special_tokens=True)
        for count in counts:
            yield texts[:count]
            texts = texts[count:]

    @contextmanager
    def _edited(self, edits: dict[int, torch.Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, added in edits.items():
                block = self.model.model.layers[layer]
                stack.enter_context(hooked(block, lambda output, added=added: output + added))
            yield


@contextmanager
def hooked(block: Any, run: Hook) -> Iterator[None]:
    handle = block.register_forward_hook(lambda _module, _args, output: run(output))
    try:
        yield
    finally:
        handle.remove()


def _parts(items: Sequence[Any], at_a_time: int) -> list[Sequence[Any]]:
    return [items[start : start + at_a_time] for start in range(0, len(items), at_a_time)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(lambda: Plain(*sys.argv[1:]))
