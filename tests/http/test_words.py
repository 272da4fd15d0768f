"""`features`, `search`, `steer`, `sweep` and `chat`: what they print for programs and on narrow, plain terminals."""

from __future__ import annotations

import json

import pytest
from commands import on_a_terminal, without_colours
from served import SOURCE, TEXT, Served
from test_cli import complaint, rows
from typer.testing import CliRunner

import neuronpedia_inference as ni
from neuronpedia_inference.cli import app
from neuronpedia_inference.client.terminal import LEVELS

FEATURE = "15-res-4k/1113"
PROMPT = "The most important thing is"
BARS = frozenset(LEVELS.strip())


def test_features_are_a_line_each(server: Served) -> None:
    found = rows("features", TEXT, "--source", SOURCE, "--limit", "3", "--url", server.url)
    with ni.connect(server.url) as service:
        expected = service.features(TEXT, SOURCE, num_results=3)
    assert [row["feature"] for row in found] == [one.name for one in expected]
    assert [float(row["max"]) for row in found] == pytest.approx([one.max_value for one in expected], rel=1e-5)
    told = CliRunner().invoke(app, ["features", "-", "--source", SOURCE, "--json", "--url", server.url], input=TEXT)
    assert len(json.loads(told.stdout)["features"][0]["values"]) == len(expected.tokens)


def test_search_takes_words(server: Served) -> None:
    found = rows("search", "moon", "orbit", "--limit", "4", "--url", server.url)
    with ni.connect(server.url) as service:
        expected = service.search("moon orbit", limit=4)
    assert [row["feature"] for row in found] == [one.name for one in expected]
    assert "moon" in found[0]["label"] + found[1]["label"]


def test_steer_writes_both_texts(server: Served) -> None:
    words = ("steer", PROMPT, "-a", f"{FEATURE}@70", "--tokens", "8", "--temperature", "0", "--url", server.url)
    plain, steered = (row["said"] for row in rows(*words))
    steering = ni.FeatureName.read(FEATURE) @ 70
    with ni.connect(server.url) as service:
        expected = service.steer(PROMPT, steering, max_new_tokens=8, temperature=0)
    assert expected.default is not None
    assert steered == " ".join(f"{PROMPT}{expected.steered.text}".split())
    assert plain == " ".join(f"{PROMPT}{expected.default.text}".split())
    assert plain != steered


def test_sweep_writes_at_several_strengths(server: Served) -> None:
    drawn = ("--tokens", "6", "--temperature", "0", "--url", server.url)
    found = rows("sweep", PROMPT, FEATURE, "--strengths", "1,70", *drawn)
    with ni.connect(server.url) as service:
        expected = service.sweep(PROMPT, ni.FeatureName.read(FEATURE), [1, 70], max_new_tokens=6, temperature=0)
    assert [float(row["strength"]) for row in found] == [0, 1, 70]
    assert [row["text"] for row in found] == [" ".join(str(row["text"]).split()) for row in expected.cells()]
    assert found[0]["text"] != found[2]["text"]


def test_chat_keeps_its_turns(server: Served) -> None:
    words = ["chat", "--clamp", f"{FEATURE}@40", "--tokens", "2", "--temperature", "0", "--url", server.url]
    ran = CliRunner().invoke(app, words, input="Hi.\n\nMe?\n")
    assert ran.exit_code == 0, ran.output
    fields = {"max_new_tokens": 2, "temperature": 0}
    steering = ni.FeatureName.read(FEATURE).clamp(40)
    with ni.connect(server.url) as service:
        talk = service.chat(steering, **fields)
        said = [talk("Hi.").steered.text, talk("Me?").steered.text]
        alone = service.steer([{"role": "user", "content": "Me?"}], steering, **fields)
    assert ran.stdout == "".join(f"{text}\n" for text in said)
    assert alone.steered.text != said[1]


def test_sixty_columns_are_enough(server: Served) -> None:
    asks = ("features", TEXT, "--source", SOURCE, "--limit", "2", "--url", server.url)
    shown = on_a_terminal(*asks, width=60)
    assert "\x1b[" in shown
    lines = without_colours(shown).splitlines()
    assert max(map(len, lines)) <= 60
    assert any(BARS & set(line) for line in lines)
    grey = on_a_terminal(*asks, width=60, NO_COLOR="1")
    assert "\x1b[38" not in grey
    assert "\x1b[48" not in grey
    assert any(BARS & set(line) for line in grey.splitlines())


def test_a_terminal_without_blocks_gets_plain_signs(server: Served) -> None:
    steered = ("steer", PROMPT, "-a", f"{FEATURE}@70", "-w", FEATURE, "--tokens", "4", "--url", server.url)
    shown = without_colours(on_a_terminal(*steered, width=60, PYTHONIOENCODING="ascii"))
    assert shown.isascii()
    assert "\\u" not in shown
    assert any(set(line.strip()) <= set(".:-=+*%# ") and "#" in line for line in shown.splitlines())


def test_words_may_have_hyphens_and_underscores(server: Served) -> None:
    body = json.dumps({"prompt": TEXT, "source": SOURCE, "top_k": 1})
    answers = [
        CliRunner().invoke(app, ["call", name, body, "--url", server.url, option, "[]"])
        for name, option in (("top_k", "--sae-sets"), ("top-k", "--sae_sets"))
    ]
    assert [one.exit_code for one in answers] == [0, 0], answers[1].output
    assert answers[0].stdout == answers[1].stdout


def test_the_version_is_said() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"neuronpedia-inference {ni.__version__}\n"


@pytest.mark.parametrize(
    "words", [("steer", "x", "-a", FEATURE), ("chat", "--clamp", "1113@8"), ("steer", "x", "-w", "a")]
)
def test_what_names_no_feature_is_one_line(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = complaint(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert "source/index" in said
    assert len(said.splitlines()) == 1
