"""One probe at start decides what is served: what a model's places hold, and who may share a pass.

Nothing is believed of an architecture by its name. Every place is read in a pass of the loaded model and held against
what it means: block outputs are the next block's inputs, contributions add up, values weighted by the pattern are what
the heads give. Every way to steer is tried, and its change looked for further down. Rows of different length, joining
late, past the sliding window, must come out merged as alone. What fails is not served, and the verdict says why.
"""

from __future__ import annotations

from typing import Any

from neuronpedia_inference.engine.decoder import Decoder
from neuronpedia_inference.engine.merging import why_not_capture, why_not_merge, why_not_record
from neuronpedia_inference.engine.places import findings
from neuronpedia_inference.engine.readout import why_not_read_out
from neuronpedia_inference.engine.static import as_cuda_graph
from neuronpedia_inference.engine.verdict import Verdict

IDS = (1, 2, 3, 5, 8, 13, 21)
"""Tokens of the probe, modulo the vocabulary."""


def probe(decoder: Decoder, *, max_positions: int | None = None, graphs: bool = False) -> Verdict:
    """Try everything: some thirty passes over a few tokens. The tree's places are then what was found.

    max_positions: of the longest text that will be served; None for any. `graphs`: whether decode steps should be
    recorded.
    """
    embedding: Any = decoder.model.get_input_embeddings()
    ids = [token % len(embedding.weight) for token in IDS]
    found, n_value_heads = findings(decoder.tree, ids, decoder.tree.rms_eps)
    form, unmerged_because = why_not_merge(decoder, ids, max_positions)
    return Verdict(
        found,
        form,
        unmerged_because,
        why_not_capture(decoder, ids, max_positions),
        _why_not_record(decoder, form, ids) if graphs else "CUDA_GRAPHS is off",
        n_value_heads,
        why_not_read_out(decoder.tree, ids),
    )


def _why_not_record(decoder: Decoder, form: str, ids: list[int]) -> str:
    device = decoder.model.device.type
    return why_not_record(decoder, form, as_cuda_graph, ids) if device == "cuda" else f"the device is {device}"
