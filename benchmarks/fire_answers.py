"""Parts 9 and 10: what friendly operations answer without a word about it, and streamed text."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.fire_models import SAID, SPACES, reciting, wide
from benchmarks.fire_tree import MODEL, SOURCE, Tree, short, told

TEXT = "The cat sat on the mat."
CHAT = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Say hi."}]
END_OF_TURN = "<|im_end|>"
ACTIVATIONS, TOP_K, STEER, TOKENIZE = "/v1/activations", "/v1/top-k", "/v1/steer", "/v1/tokenize"
NUMBERS_APART = 1e-3


def an_unknown_field_is_refused_by_the_near_name(tree: Tree) -> str:
    """Unknown fields are refused with the near name: `max_tokens`, `ignorBos`."""
    said = tree.open.refused(STEER, {"prompt": "a", "features": [], "max_tokens": 3}, "max_tokens", "max_new_tokens")
    tree.open.refused(ACTIVATIONS, {"prompt": "a", "source": SOURCE, "ignorBos": False}, "ignorBos", "ignoreBos")
    tree.open.refused(TOP_K, {"prompt": "a", "source": SOURCE, "topk": 3}, "topk", "top_k")
    return said


def a_variable_near_a_setting_is_told(tree: Tree) -> str:
    """The same for environment names close to a setting: warn at start."""
    with tree.loading(*tree.small_words, env={"TOKEN_LIMT": "7"}) as served:
        served.ready()
        lines = [line for line in (served.err + served.out).splitlines() if "TOKEN_LIMT" in line]
    assert any("TOKEN_LIMIT" in line for line in lines), f"it starts without a word: {short(served.err + served.out)}"
    return short(lines[0])


def positions_index_their_own_tokens(tree: Tree) -> str:
    """`top_k`'s positions index its own `tokens`: all of them, BOS marked."""
    (result,) = tree.open.asked(TOP_K, {"prompt": TEXT, "source": SOURCE, "top_k": 3})["results"]
    tokens = result["tokens"]
    for position in result["positions"]:
        place = position["token_position"]
        assert place < len(tokens), f"position {place} of {len(tokens)} tokens"
        assert tokens[place] == position["token"], f"position {place} is {position['token']!r}, not {tokens[place]!r}"
    whole = tree.open.asked(TOKENIZE, {"model": MODEL, "text": TEXT})["token_strings"]
    assert (tokens, result.get("has_bos")) == (whole, True), f"{tokens} of {whole}, BOS: {result.get('has_bos')}"
    return f"{len(result['positions'])} positions of {len(tokens)} tokens, BOS marked"


def one_feature_counts_as_all_do(tree: Tree) -> str:
    """`activations` with and without `index` count alike."""
    (ranked,) = tree.open.asked(ACTIVATIONS, {"prompt": TEXT, "source": SOURCE, "num_results": 3})["results"]
    for one in ranked["features"]:
        asked = {"prompt": TEXT, "source": SOURCE, "index": one["index"]}
        (alone,) = tree.open.asked(ACTIVATIONS, asked)["results"]
        assert alone["tokens"] == ranked["tokens"], f"{len(alone['tokens'])} tokens, and {len(ranked['tokens'])}"
        (found,) = alone["features"]
        assert found["max_value_index"] == one["max_value_index"], (found["max_value_index"], one["max_value_index"])
        apart = max(abs(a - b) for a, b in zip(found["values"], one["values"], strict=True))
        assert apart <= NUMBERS_APART * one["max_value"], f"feature {one['index']}: {apart} apart"
    return f"the same {len(ranked['tokens'])} tokens and values for {len(ranked['features'])} features"


def features_that_do_not_fire_are_not_listed(tree: Tree) -> str:
    """Features that do not fire are not listed."""
    (ranked,) = tree.open.asked(ACTIVATIONS, {"prompt": " cat", "source": SOURCE, "num_results": 200})["results"]
    silent = [one["index"] for one in ranked["features"] if one["max_value"] == 0]
    assert not silent, f"{len(silent)} of {len(ranked['features'])} do not fire"
    (result,) = tree.open.asked(TOP_K, {"prompt": " cat", "source": SOURCE, "top_k": 200})["results"]
    listed = [one for position in result["positions"] for one in position["top_features"]]
    silent = [one["feature_index"] for one in listed if one["activation_value"] == 0]
    assert not silent, f"{len(silent)} of top_k's {len(listed)} do not fire"
    assert ranked["features"], "nothing fires at all"
    return f"{len(ranked['features'])} of 200 asked for, all of which fire"


def empty_texts_are_refused(tree: Tree) -> str:
    """Empty texts are refused, and not answered."""
    said = tree.open.refused(ACTIVATIONS, {"prompt": "", "source": SOURCE}, "empty")
    tree.open.refused(ACTIVATIONS, {"prompt": ["a", ""], "source": SOURCE}, "empty")
    tree.open.refused(TOP_K, {"prompt": "", "source": SOURCE}, "empty")
    tree.open.refused(STEER, {"prompt": "", "features": [], "max_new_tokens": 1})
    return said


def roles_that_no_template_knows_are_refused(tree: Tree) -> str:
    """Roles that no template knows are refused."""
    prompt = [{"role": "wizard", "content": "Hi"}]
    return tree.open.refused(STEER, {"prompt": prompt, "features": [], "max_new_tokens": 1}, "wizard", "assistant")


def a_friendly_text_has_no_end_of_turn(tree: Tree) -> str:
    """The friendly `text` ends before the end-of-turn token; the wire's `output` keeps it (contract 3.5)."""
    asked = {"prompt": CHAT, "features": [], "max_new_tokens": 30}
    text = tree.open.asked(STEER, {**asked, "compare": False})["steered"]["text"]
    fields: dict[str, Any] = {"steer_method": "SIMPLE_ADDITIVE", "normalize_steering": False, "types": ["STEERED"]}
    fields |= {"temperature": 0, "strength_multiplier": 1, "freq_penalty": 0, "seed": 16, "n_completion_tokens": 30}
    fields |= {"prompt": CHAT, "features": [], "model": MODEL, "steer_special_tokens": False}
    wire = tree.open.asked("/v1/steer/completion-chat", fields)
    said = wire["outputs"][0]["raw"].removeprefix(wire["input"]["raw"])
    assert said.endswith(END_OF_TURN), f"the wire says {said!r}"
    assert text == said.removesuffix(END_OF_TURN), f"it says {text!r}"
    return f"{text!r}, and the wire {said!r}"


def an_overflow_is_not_blamed_on_the_strength(tree: Tree) -> str:
    """A float16 overflow of an unsteered row is not blamed on the strength."""
    words = ("--model-id", str(wide(tree.new_folder())), "--sae-sets", "[]")
    little = {"hook": "blocks.1.hook_resid_post", "vector": [1.0] + [0.0] * 31, "strength": 1e-6}
    with tree.serving(*words, env={"MODEL_DTYPE": "float16"}) as served:
        answer = served.http.post(STEER, json={"prompt": "abc", "vectors": [little], "max_new_tokens": 3})
    said = told(answer)
    assert answer.status_code != 200, f"nothing overflows: {said}"
    assert "too large" not in said, said
    assert "float16" in said, said
    return said


# Streamed text


@cache
def _recited(tree: Tree) -> tuple[list[str], list[str]]:
    """Texts of a stream's events, and the strings of a text's tokens, of a model with a byte-fallback tokenizer."""
    folder: Path = reciting(tree.new_folder())
    with tree.serving("--model-id", str(folder), "--sae-sets", "[]") as served:
        asked = {"prompt": SAID[-1], "features": [], "compare": False, "max_new_tokens": 33}
        texts = [event["steered"]["text"] for event in served.events(asked)]
        return texts, served.asked(TOKENIZE, {"model": "m", "text": SPACES.removeprefix(" ")})["token_strings"]


def a_streamed_text_only_grows(tree: Tree) -> str:
    """Streamed text begins with what the event before said, with byte-fallback tokenizers too."""
    texts, _ = _recited(tree)
    for before, after in pairwise(texts):
        assert after.startswith(before), f"{before!r} becomes {after!r}"
    assert texts[-1] == SAID * 3, f"it says {texts[-1]!r}"
    return f"{len(texts)} events to {texts[-1]!r}"


def a_token_keeps_its_spaces(tree: Tree) -> str:
    """`token_string` keeps every space of a run."""
    _, strings = _recited(tree)
    assert "".join(strings[1:]) == SPACES, f"{strings} of {SPACES!r}"
    return f"{strings} of {SPACES!r}"


PROBES = {
    9: (
        an_unknown_field_is_refused_by_the_near_name,
        a_variable_near_a_setting_is_told,
        positions_index_their_own_tokens,
        one_feature_counts_as_all_do,
        features_that_do_not_fire_are_not_listed,
        empty_texts_are_refused,
        roles_that_no_template_knows_are_refused,
        a_friendly_text_has_no_end_of_turn,
        an_overflow_is_not_blamed_on_the_strength,
    ),
    10: (a_streamed_text_only_grows, a_token_keeps_its_spaces),
}
