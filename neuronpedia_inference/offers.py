"""What this server offers, place by place and route by route, with the reason for what it does not: plain data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from neuronpedia_inference.domain import Source
from neuronpedia_inference.engine.verdict import Finding, Verdict
from neuronpedia_inference.kept_vectors import NOT_KEPT
from neuronpedia_inference.operations import by_name
from neuronpedia_inference.points import MLP_POST, PATTERN, READABLE, WRITABLE, Point

NOT_STEERED = "this place is only read"
RECORDED_EDITS = (
    "only additions to hook_resid_pre and hook_resid_post that are the same at every generated token are recorded; "
    "while other edits take part in a step, it runs one operation at a time"
)
NO_TEMPLATE = "the tokenizer has no chat template; CHATML_FALLBACK=1 uses ChatML"
NO_HEADS = "no source that is served reads what attention heads give (attn.hook_z)"
NO_PERSONA = "no persona axes are served for this model; PERSONA_DIR gives them"
NO_TEMPORAL = "it is for temporal SAEs, and none of those that are served is one"
_WITHOUT_SAES = ("activation_single", "activation_single_batch", "activation_raw", "activation_attention")

Layers = Mapping[str, Any]
"""`layers`: those where it can be done. `refused`: the other ones by the reason."""


def offered(
    verdict: Verdict,
    sources: Collection[Source],
    *,
    chat: bool,
    no_jacobians: str = "",
    keeps_vectors: bool = True,
    has_persona: bool = True,
) -> dict[str, Any]:
    """The keys `places`, `edits`, `endpoints` (a map of names to whether they are served, as the wire has it) and
    `endpoints_off_because` (the reasons of those that are not). chat: whether there is a chat template.
    no_jacobians: why there is no Jacobian lens; empty if there is one.
    """
    refused = refused_endpoints(
        verdict,
        sources,
        chat=chat,
        no_jacobians=no_jacobians,
        keeps_vectors=keeps_vectors,
        has_persona=has_persona,
    )
    return {
        "places": places(verdict),
        "edits": edits(verdict, sources),
        "endpoints": {name: not because for name, because in refused.items()},
        "endpoints_off_because": {name: because for name, because in refused.items() if because},
    }


def edits(verdict: Verdict, sources: Collection[Source]) -> dict[str, Any]:
    """`sources`: those whose features can be clamped, scaled and swapped. `refused`: the others by the reason; they can
    be added where they have decoder rows. `unrecorded_because`: why a step in which edits take part is not replayed.
    """
    refused: dict[str, list[str]] = {}
    for source in sources:
        because = _why_not_set(source)
        if because:
            refused.setdefault(because, []).append(source.name)
    taken = {name for names in refused.values() for name in names}
    return {
        "sources": [source.name for source in sources if source.name not in taken],
        "refused": refused,
        "unrecorded_because": verdict.unrecorded_because or RECORDED_EDITS,
    }


def _why_not_set(source: Source) -> str:
    if source.unread_alone_because:
        return f"{source.architecture}: {source.unread_alone_because}"
    if source.is_transcoder and not source.hook_out:
        return f"{source.architecture}: it does not say where it writes"
    return ""


def places(verdict: Verdict) -> dict[str, dict[str, Layers]]:
    """For every place with one vector per token: the layers where it can be read, steered, and shared with others.

    `merged`: where a capture shares its pass with those of other requests, and steered rows decode with other rows.
    """
    found: dict[str, list[tuple[int, Finding]]] = {place: [] for place in READABLE}
    for point, finding in sorted(verdict.findings.items()):
        if point.place in found:
            found[point.place].append((point.layer, finding))
    return {place: _place(place, layers, verdict) for place, layers in found.items()}


def _place(place: str, layers: Collection[tuple[int, Finding]], verdict: Verdict) -> dict[str, Layers]:
    def unmerged(finding: Finding) -> str:
        is_steered = place in WRITABLE and not finding.unwritten_because
        reasons = (verdict.uncaptured_because, verdict.unmerged_because if is_steered else "")
        return finding.unread_because or "; ".join(dict.fromkeys(filter(None, reasons)))

    def unwritten(finding: Finding) -> str:
        return finding.unwritten_because if place in WRITABLE else NOT_STEERED

    whys: dict[str, Callable[[Finding], str]] = {
        "readable": lambda finding: finding.unread_because,
        "writable": unwritten,
        "merged": unmerged,
    }
    return {word: _by_reason((layer, why(finding)) for layer, finding in layers) for word, why in whys.items()}


def _by_reason(layers: Iterable[tuple[int, str]]) -> Layers:
    """(layer, reason, empty if it can be done) of every layer."""
    able: list[int] = []
    refused: dict[str, list[int]] = {}
    for layer, because in layers:
        (refused.setdefault(because, []) if because else able).append(layer)
    return {"layers": able, "refused": refused}


def refused_endpoints(
    verdict: Verdict,
    sources: Collection[Source],
    *,
    chat: bool,
    no_jacobians: str,
    keeps_vectors: bool,
    has_persona: bool,
) -> dict[str, str]:
    """Why what the wire's clients look for is not served, empty where it is: every operation, `dfa` and `neurons`."""
    neurons = _none_can(verdict, MLP_POST)
    no_features = f"no SAEs are served, and this model has no neurons: {neurons}" if neurons and not sources else ""
    because = {name: no_features if _needs_features(name) else "" for name in by_name}
    because["lens_logit"] = because["lens_prompt"] = verdict.no_lens_because
    because["lens_jacobian"] = verdict.no_lens_because or no_jacobians
    because["util_similarity_matrix_pred"] = "" if any(one.is_temporal for one in sources) else NO_TEMPORAL
    because["activation_attention"] = _none_can(verdict, PATTERN)
    because["persona_monitor"] = "" if has_persona and chat else NO_PERSONA if not has_persona else NO_TEMPLATE
    because["put_vectors"] = "" if keeps_vectors else NOT_KEPT
    if not chat:
        because |= {"steer_completion_chat": NO_TEMPLATE, "apply_chat_template": NO_TEMPLATE}
        because["chat_completions"] = NO_TEMPLATE
    return {**because, "dfa": _no_attribution(verdict, sources), "neurons": neurons}


def _needs_features(operation: str) -> bool:
    return operation in ("activations", "top_k", "contrast", "feature") or (
        operation.startswith("activation_") and operation not in _WITHOUT_SAES
    )


def _none_can(verdict: Verdict, place: str) -> str:
    """Why no layer's place can be read; empty if one can."""
    reasons = [finding.unread_because for point, finding in verdict.findings.items() if point.place == place]
    return "" if "" in reasons else next(iter(reasons), "it has no layers")


def _no_attribution(verdict: Verdict, sources: Collection[Source]) -> str:
    """Why no source's features are attributed to positions; empty if one source's are."""
    reasons = [verdict.findings[Point(source.layer, PATTERN)].unread_because for source in sources if source.has_dfa]
    return "" if "" in reasons else next(iter(reasons), NO_HEADS)
