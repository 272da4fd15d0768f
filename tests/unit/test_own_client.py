"""The client's values: steering by operators, results that draw themselves and go to files, errors by their codes."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import neuronpedia_inference as ni
from neuronpedia_inference.client import AsyncClient, Client, Result
from neuronpedia_inference.client.calls import features, lens, steer
from neuronpedia_inference.client.failures import failure, failure_from_text
from neuronpedia_inference.client.lens_grid import DRAWN, LensGrid, LensReading, LensToken
from neuronpedia_inference.client.results import (
    ActiveFeature,
    Context,
    Contrast,
    Feature,
    Features,
    FoundFeature,
    Neighbour,
    SearchResults,
    SeparatingFeature,
    TokenEffect,
    TopFeature,
    TopFeatures,
)
from neuronpedia_inference.client.steering import FeatureName, Steering, Vector
from neuronpedia_inference.client.swept import Scored, Scores, Sweep, SweepCell
from neuronpedia_inference.client.written import Steered, Text, Watched, WatchValues
from neuronpedia_inference.errors import InferenceError, InvalidRequest, LimitExceeded, Overloaded
from neuronpedia_inference.operations import InvalidBody
from neuronpedia_inference.schemas import steering as wire

MOON = FeatureName("10-res-4k", 1608, "moon")
COURT = FeatureName("15-res-4k", 7)
TEXT = ("See", " http", "://", "<b>", "\n", "HTTP")
VALUES = (0.0, 2.0, -1.0, 4.0, 1.0, 0.5)

WATCHED = Watched(
    ("<s>", "I", " think", " so", " http"),
    (
        WatchValues({"source": "s", "index": 1}, (900.0, 0.0, 2.0, 4.0, 1.0), (900.0, 0.0, 1.0, 1.0, 0.5)),
        WatchValues({"source": "s", "top_k": 1}, ([{"index": 3, "value": 1.0}],) * 5),
    ),
)


def read_out(place: int, *shares: float) -> LensToken:
    """A token behind which two lenses read, one of them in as many blocks as there are shares."""
    words, rest = ((" next", " http"),), ((0.25, 0.0),)
    each = tuple((share, 0.01) for share in shares)
    readings = (LensReading("LOGIT_LENS", words * len(each), each), LensReading("JACOBIAN_LENS", words, rest))
    return LensToken(f" token{place} http\n", place, place, place > 2, readings)


LENS = LensGrid({"LOGIT_LENS": (3, 7), "JACOBIAN_LENS": (7,)}, tuple(read_out(n, 0.5, 1.0) for n in range(40)), " so")

RESULTS: list[Result] = [
    Features(
        TEXT, (ActiveFeature("s", 1, VALUES, 4.0, 3, 'a "label" & more', 0.5), ActiveFeature("s", 2, VALUES, 4.0, 3))
    ),
    TopFeatures(TEXT[:2], ((), (TopFeature("s", 1, 2.0, "x"), TopFeature("s", 2, 1.0)))),
    SearchResults("moon", (FoundFeature("s", 1, 2.5, "moon", 0.01, 9.0, Context(TEXT, VALUES, "A book")),)),
    Feature(
        "s",
        1,
        "blocks.1.hook_resid_post",
        "jumprelu",
        "moon",
        ("moon", "sun"),
        0.01,
        9.0,
        2.0,
        (Context(TEXT, VALUES, "http"),),
        (0.5, 0.25),
        (1.0, 2.0),
        1.0,
        -0.5,
        2.0,
        (Neighbour("s", 2, 0.75, "sun"),),
        (TokenEffect(" moon", 7, 1.5),),
        (TokenEffect(" http", 8, -1.5),),
    ),
    Contrast((SeparatingFeature("s", 1, 2.0, 1.0, 0.0, 1.0, 0.5, "moon", 0.01),), (), 3),
    Steered(
        "I think",
        Text(" so http", tokens=(" so", " http"), watch=WATCHED),
        Text(" not"),
        MOON @ 60 + Vector([0.5, 1], "blocks.1.hook_resid_post") @ 2,
    ),
    Sweep(
        ("I think http",),
        ("10-res-4k/1608", "Steering(nothing)"),
        (SweepCell(" a", 0, 0, 10.0, 1, "length", -1.5, 0.25, (2.0,)), SweepCell(" b", 0, 1, 20.0, 1)),
        (SweepCell(" plain", seed=1, logprob_per_token=-1.0, repetition=0.0),),
        (10.0, None),
    ),
    LENS,
    Scores("I think", (Scored(" so http", -3.0, -1.5, True, (" so", " http"), (-1.0, -2.0)),)),
]


# Steering


def test_a_steering_is_built_by_operators() -> None:
    both = MOON @ 60 + COURT @ 20 * 2 - FeatureName("s", 1) @ 5
    assert both.body() == {
        "features": [
            {"source": "10-res-4k", "index": 1608, "strength": 60.0},
            {"source": "15-res-4k", "index": 7, "strength": 40.0},
            {"source": "s", "index": 1, "strength": -5.0},
        ]
    }
    assert repr(MOON @ 60) == "Steering(10-res-4k/1608 @ 60)"
    vector = Vector([1, 2.5], "blocks.3.hook_resid_post") @ 3
    assert (vector + MOON @ 1).body()["vectors"] == [
        {"vector": [1.0, 2.5], "hook": "blocks.3.hook_resid_post", "strength": 3.0}
    ]
    assert Steering() + both == both
    assert Steering().body() == {}


def test_a_steering_goes_to_json_and_back() -> None:
    made = MOON @ 60.5 + Vector([0.1, -2], "h") @ 3
    assert Steering.from_json(made.to_json()) == made
    edits = (COURT.clamp(8, "of_max") + MOON @ 3 + Vector([1, 2], "h").project_out()).on(phase="generated", from_=2)
    held = edits.when((COURT > 3) & ~(MOON < 1).lasting("from_then_on")) + COURT.swap(MOON)
    assert Steering.from_json(held.to_json()) == held
    with pytest.raises(KeyError, match="a steering has features, vectors and edits, not rules"):
        Steering.from_body({"rules": []})


def test_edits_say_what_the_service_reads() -> None:
    made = COURT.clamp(8).on(phase="generated", from_=2, except_={"first": 1}).when(MOON > 3) + MOON @ 5
    assert made.body() == {
        "edits": [
            {
                "do": "clamp",
                "feature": "15-res-4k/7",
                "amount": 8.0,
                "on": {"phase": "generated", "from": 2, "except": {"first": 1}},
                "when": {"feature": "10-res-4k/1608", "above": 3.0},
            },
            {"do": "add", "feature": "10-res-4k/1608", "amount": 5.0},
        ]
    }
    every = COURT.scale(0.5) + COURT.ablate() + COURT.at_least(1) + COURT.at_most(9, "dose") + COURT.add(2, "of_max")
    vector = Vector([1.0, 2.0], "blocks.1.hook_resid_post")
    every += COURT.swap(MOON) + vector.orthogonal(2) + vector.cap(1) + vector.floor(1, "dose") + vector.add(1, "dose")
    when = (COURT > 1).lasting(3) | ~(COURT < 2)
    for said in ((every + vector.project_out()).on(first=3).when(when), made, vector @ 3 + MOON @ 2, Steering()):
        read = wire.Steering.model_validate(said.body())
        assert read.model_dump(by_alias=False, exclude_unset=True) == said.body()
    assert repr(COURT.clamp(8)) == "Steering(15-res-4k/7 clamp 8)"
    with pytest.raises(ValueError, match="only additions can be multiplied, not 15-res-4k/7 clamp 8"):
        _ = COURT.clamp(8) * 2


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("15-res-4k/7", "15-res-4k"),
        (" smollm2-135m-instruct/15-res-4k/7 ", "smollm2-135m-instruct/15-res-4k"),
        (
            "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/7?embed=true",
            "gemma-2-2b/20-gemmascope-res-16k",
        ),
        ("neuronpedia.org/gpt2-small/5-res-jb/7/", "gpt2-small/5-res-jb"),
    ],
)
def test_a_feature_is_read_from_its_name_or_its_address(name: str, source: str) -> None:
    assert FeatureName.read(name) == FeatureName(source, 7)


@pytest.mark.parametrize("name", ["", "7", "15-res-4k", "15-res-4k/x", "15-res-4k/-1", "/7", "15-res-4k/7.5"])
def test_what_names_no_feature_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="names no feature"):
        FeatureName.read(name)


def test_what_is_left_out_is_the_service_s_choice() -> None:
    assert features("a", source=None).body == {"prompt": "a"}
    assert steer("a", None, seed=None).body == {"prompt": "a", "features": []}
    assert steer([{"role": "user", "content": "hi"}], MOON @ 1, max_new_tokens=4).body == {
        "prompt": [{"role": "user", "content": "hi"}],
        "features": [{"source": "10-res-4k", "index": 1608, "strength": 1.0}],
        "max_new_tokens": 4,
    }


# Results


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_a_result_goes_to_a_file_and_back(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result
    assert type(result).load(tmp_path / "result.json") == result
    other = Sweep if not isinstance(result, Sweep) else Steered
    with pytest.raises(ValueError, match=f"this is no {other.__name__}"):
        other.load(tmp_path / "result.json")


class Strict(HTMLParser):
    """Every element is closed, in order; nothing is a script or is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.focusable: list[dict[str, str | None]] = []
        self.said = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"div", "p", "span", "table", "thead", "tbody", "tr", "th", "td"}, tag
        assert {name for name, _ in attrs} <= {"style", "title", "tabindex", "aria-label", "scope"}
        self.open.append(tag)
        if ("tabindex", "0") in attrs:
            self.focusable.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_a_notebook_shows_it_without_scripts_or_addresses(result: Result) -> None:
    html = result._repr_html_()
    assert "http" not in html.lower()
    page = Strict()
    page.feed(html)
    page.close()
    assert page.open == []
    if any("http" in str(text).lower() for text in vars(result).values() if not isinstance(text, str)):
        assert "http" in page.said.lower(), "the texts themselves are whole"


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_what_may_be_too_wide_is_scrolled_by_keyboard(result: Result) -> None:
    page = Strict()
    page.feed(result._repr_html_())
    assert page.focusable, "a value, or else the whole"


def test_values_are_reached_by_keyboard_and_hover() -> None:
    page = Strict()
    page.feed(RESULTS[0]._repr_html_())
    firing = [value for value in VALUES if value > 0]
    assert len(page.focusable) == 2 * len(firing)
    assert [spot["title"] for spot in page.focusable[:2]] == ["http: 2", "<b>: 4"]
    assert all(spot["title"] == spot["aria-label"] for spot in page.focusable)


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_a_result_prints_in_one_line_and_draws_itself(result: Result) -> None:
    assert "\n" not in repr(result)
    assert repr(result).startswith(type(result).__name__)
    console = Console(width=60, record=True, color_system=None, file=None, quiet=False)
    with console.capture() as captured:
        console.print(result)
    lines = captured.get().splitlines()
    assert lines
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_a_result_is_a_table(result: Result) -> None:
    table = result.df()
    assert len(table) == len(result.cells()) > 0
    assert [*table.columns] == [*result.cells()[0]]


def test_a_sweep_in_a_terminal_has_strengths_down_and_says_which_is_suggested() -> None:
    sweep = next(result for result in RESULTS if isinstance(result, Sweep))
    console = Console(width=60, color_system=None)
    with console.capture() as captured:
        console.print(sweep)
    rows = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert [row for row in rows if row.startswith(("plain", "10", "20"))] == [
        "10-res-4k/1608",
        "plain plain",
        "10 (suggested) a",
        "plain plain",
        "20 b",
    ]
    assert "strength I think http" in rows, "one seed is not told"
    more = replace(sweep, texts=(*sweep.texts, replace(sweep.texts[0], seed=2, text=" c")))
    assert "I think http · seed 2" in more._repr_html_().replace("&#116;", "t")


def test_a_vector_prints_in_one_line() -> None:
    assert (
        repr(Vector([3.0, -4.0], "blocks.1.hook_resid_post")) == "Vector(vector[2] at blocks.1.hook_resid_post, norm 5)"
    )
    assert repr(Vector("vec:" + "a" * 64, "h")) == "Vector(vec:aaaaaaaaaaaaaaaa at h)"


def test_a_watched_feature_is_a_strip_without_the_token_that_nobody_wrote() -> None:
    steered: Any = next(result for result in RESULTS if isinstance(result, Steered))
    page = Strict()
    page.feed(steered._repr_html_())
    assert [spot["title"] for spot in page.focusable] == ["think: 2", "so: 4", "http: 1"]
    assert "background:rgba(249,115,22,0.90)" in str(page.focusable[1]["style"]), "the largest but for BOS's"
    assert "s/1" in page.said
    assert steer("a", None, watch=[MOON, {"hook": "h"}]).body["watch"] == [
        {"source": "10-res-4k", "index": 1608},
        {"hook": "h"},
    ]


def test_a_token_that_nobody_wrote_is_not_drawn() -> None:
    found = Features(("<s>", "I"), (ActiveFeature("s", 1, (900.0, 2.0), 900.0, 0),), has_bos=True)
    assert "&lt;s&gt;" not in found._repr_html_()
    assert "&lt;s&gt;" in replace(found, has_bos=False)._repr_html_()
    console = Console(width=60, color_system=None)
    with console.capture() as captured:
        console.print(found)
    assert "<s>" not in captured.get().splitlines()[1]
    assert found.numpy().shape == (1, 2), "but it counts"


def test_activations_are_an_array() -> None:
    found: Any = RESULTS[0]
    assert found.numpy().tolist() == [list(VALUES), list(VALUES)]
    assert Features(TEXT, ()).numpy().shape == (0, 6)


def test_an_answer_of_another_shape_is_told() -> None:
    with pytest.raises(ValueError, match="this is no Features"):
        Features.read({"tokens": "a"})
    with pytest.raises(ValueError, match="this is no Result"):
        Result.from_json(json.dumps({"kind": "Nothing", "value": {}}))


def test_fields_that_a_newer_service_adds_do_no_harm() -> None:
    assert Contrast.read({"a": [], "b": [], "n_dense": 0, "new": 1}) == Contrast((), (), 0)


# The lens


def test_a_lens_draws_the_last_tokens_and_holds_all() -> None:
    page = Strict()
    page.feed(LENS._repr_html_())
    assert f"the last {DRAWN} of 40 tokens" in page.said
    assert len(page.focusable) == DRAWN * 3, "every value can be reached"
    assert [spot["title"] for spot in page.focusable[:DRAWN]] == [" next 100.0%,  http 1.0%"] * DRAWN, "the last block"
    assert "token7 http⏎" not in page.said
    assert "token8 http⏎" in page.said
    assert len(LENS.cells()) == 40 * 3 * 2
    few = replace(LENS, tokens=LENS.tokens[:4], has_bos=True)
    assert "token0" not in few._repr_html_()
    assert "token1" in few._repr_html_()
    assert len(few) == 4


@pytest.mark.parametrize("width", [30, 60, 200])
def test_a_lens_in_a_terminal_has_every_token_that_is_drawn_once(width: int) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(LENS)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    heads = re.findall(r"token\d+", "\n".join(line for line in lines if "token" in line))
    assert heads == [f"token{place}" for place in range(8, 40)] * 2
    assert any(line.startswith("7  next") and "█" in line for line in lines)


def test_a_lens_is_an_array_of_one_of_its_lenses() -> None:
    assert LENS.numpy("LOGIT_LENS").shape == (40, 2, 2)
    assert LENS.numpy("JACOBIAN_LENS")[3].tolist() == [[0.25, 0.0]]
    with pytest.raises(ValueError, match="lens: name one of LOGIT_LENS, JACOBIAN_LENS, not None"):
        LENS.numpy()


def test_what_the_lens_route_would_ignore_is_refused() -> None:
    assert lens("a", "LOGIT_LENS", "m", layers=[3], top_n=None).body == {
        "model": "m",
        "type": ["LOGIT_LENS"],
        "prompt": "a",
        "stream": False,
        "layers": [3],
    }
    assert lens([{"role": "user", "content": "hi"}], ["LOGIT_LENS"], "m").body["chat"][0]["content"] == "hi"
    with pytest.raises(InvalidRequest, match=r"lens: there is no field 'top_k'. Did you mean"):
        lens("a", "LOGIT_LENS", "m", top_k=3)
    with pytest.raises(InvalidRequest, match="there is no field 'stream'"):
        lens("a", "LOGIT_LENS", "m", stream=True)


# Errors


def test_errors_are_the_service_s_classes_with_the_request_id() -> None:
    assert type(failure("limit_exceeded", "too long", "abc")) is LimitExceeded
    assert failure("limit_exceeded", "too long", "abc").request_id == "abc"
    assert type(failure("invalid_request", "no", "")) is InvalidRequest
    assert type(failure("invalid_body", "no", "")) is InvalidBody
    full = failure("overloaded", "full", "x", 7)
    assert isinstance(full, Overloaded)
    assert full.retry_after_s == 7
    assert Overloaded.retry_after_s == 1, "the class is as it was"
    unknown = failure("of_tomorrow", "what", "x")
    assert (type(unknown), unknown.code, str(unknown)) == (InferenceError, "of_tomorrow", "what")


def test_errors_of_a_deployed_class_are_read_from_their_texts() -> None:
    read = failure_from_text(ValueError("limit_exceeded: Text too long: 9 tokens (or more)"))
    assert isinstance(read, LimitExceeded)
    assert read.message == "Text too long: 9 tokens (or more)"
    ours = failure_from_text(RuntimeError("engine_failed: it broke (request 12-ab)"))
    assert ours is not None
    assert (ours.code, ours.message, ours.request_id) == ("engine_failed", "it broke", "12-ab")
    assert failure_from_text(RuntimeError("startup_failed: no")) is None
    assert failure_from_text(ValueError("nothing of ours")) is None


# Both forms


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, str]:
        found = {name: function for name, function in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}
        return {name: re.sub(r" -> .*", "", str(inspect.signature(function))) for name, function in found.items()}

    assert methods(Client) == methods(AsyncClient)
    assert len(methods(Client)) >= 10


def test_names_are_there_without_an_import_of_their_own() -> None:
    assert ni.Client is Client
    assert set(ni.__all__) <= set(dir(ni))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ni.nothing  # pyright: ignore[reportAttributeAccessIssue]  (there is none)


def test_an_address_without_a_scheme_is_refused_and_keys_are_not_shown() -> None:
    with pytest.raises(InvalidRequest, match="begins neither with"):
        ni.connect("localhost:5002")
    assert "sesame" not in repr(ni.connect("http://127.0.0.1:1", "sesame"))


def test_rules_bounds_and_what_edits_did_pass_through() -> None:
    rules = [{"when": {"feature": "a/1", "above": 1}, "do": "retry", "back": 2}]
    call = steer("a", MOON @ 1, watch=["edits", MOON], rules=rules, max_dose={"value": 1})
    assert call.body["watch"] == ["edits", {"source": "10-res-4k", "index": 1608}]
    assert (call.body["rules"], call.body["max_dose"]) == (rules, {"value": 1})
    edit = {"edit": "features.0", "share": [1.0], "dose": [0.5], "before": None, "target": None, "after": None}
    values = [{"watch": "edits", "before": None, "after": None, "edits": [edit]}]
    text = {"text": " b", "watch": {"tokens": ["a"], "values": values}, "over_dose": [], "events": [{"rule": 0}]}
    made = call.read({"steered": text, "default": None})
    watch = made.steered.watch
    assert watch is not None
    assert watch.values[0].edits is not None
    assert watch.values[0].edits[0].dose == (0.5,)
    assert watch.values[0].name == "edits"
    assert made.steered.events == ({"rule": 0},)
    assert Result.from_json(made.to_json()) == made
