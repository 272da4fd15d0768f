"""What a server says of itself: model, sources, limits, and what cannot be done, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.protocol import ModelInfo
from neuronpedia_inference.lenses.jacobians import Jacobians
from neuronpedia_inference.offers import offered
from neuronpedia_inference.persona import Persona
from neuronpedia_inference.points import MLP_POST
from neuronpedia_inference.saes.shelf import Shelf
from neuronpedia_inference.settings import Settings


def describe(
    settings: Settings,
    model: ModelInfo,
    engine: ModelEngine,
    shelf: Shelf,
    jacobians: Jacobians,
    persona: Persona | None,
    load: Mapping[str, Any],
) -> dict[str, Any]:
    """For `/v1/capabilities`. load: what is inside now, and what there is for it."""
    return {
        "model": model.name,
        "model_id": model.id,
        "family": model.family,
        "backend": "eager" if engine.graphs_off_because else "cuda_graph",
        "graphs_off_because": engine.graphs_off_because or None,
        "graphs_not_with": ["watch", "rules", "receipt"],
        "lens_off_because": engine.verdict.no_lens_because or None,
        "jacobian_layers": jacobians.layers,
        "device": model.device,
        "dtype": model.dtype,
        "num_layers": model.n_layers,
        "d_model": model.d_model,
        "vocab_size": model.vocab_size,
        "context_length": model.context_length,
        "sae_sets": list(shelf.source_sets),
        "sources": [source.name for source in shelf.sources],
        "sources_coming": list(shelf.coming),
        "sources_ask_for": {source.name: list(source.asks) for source in shelf.sources if source.asks},
        "token_limit": token_limit(settings, model),
        "activation_token_limit": token_limit(settings, model),
        "lens_token_limit": min(settings.lens_token_limit, model.context_length),
        "max_tokens": max_tokens(settings, model),
        "max_num_results": settings.max_results,
        "max_top_k": settings.max_top_k,
        "max_result_values": settings.max_result_values,
        "max_body_bytes": settings.max_body_bytes,
        "max_concurrent_requests": settings.max_concurrent_requests,
        "capture_points": list(engine.readable_places()),
        "writes_available": list(engine.writable_places()),
        "typical_norms": engine.typical_norms(),
        "chat": model.has_chat_template,
        "neurons": MLP_POST in engine.readable_places(),
        "persona": None if persona is None else persona.describe(),
        "dfa": any(source.has_dfa for source in shelf.sources),
        "sae_cache": shelf.stats(),
        "merges_completions": not engine.unmerged_because,
        "unmerged_because": engine.unmerged_because or None,
        "max_rows": settings.max_rows,
        **load,
        **offered(
            engine.verdict,
            shelf.sources,
            chat=model.has_chat_template,
            no_jacobians=jacobians.off_because,
            keeps_vectors=settings.kept_vectors_mib > 0,
            has_persona=persona is not None,
        ),
    }


def token_limit(settings: Settings, model: ModelInfo) -> int:
    """Tokens of a prompt that is only read."""
    return min(settings.token_limit, model.context_length)


def max_tokens(settings: Settings, model: ModelInfo) -> int:
    """Tokens of a prompt and its completion together."""
    return min(settings.max_tokens, model.context_length)
