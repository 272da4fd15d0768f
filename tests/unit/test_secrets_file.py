"""Several secrets with names: who may call now, and what is never told."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from neuronpedia_inference import secrets_file
from neuronpedia_inference.errors import NotReady, StartupError
from neuronpedia_inference.observability import STARS, Redactor
from neuronpedia_inference.secrets_file import SecretsFile, parse
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web.app import create_app

TEAM = "# the team\n\nada = first-key\n  bo@lab.example=second=key\n"


def test_a_line_is_a_name_and_a_secret() -> None:
    assert parse(TEAM) == {"ada": "first-key", "bo@lab.example": "second=key"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ada=hush\nhush", "line 2 is not `name=secret`"),
        ("a b=hush", "line 1 is not"),
        ("ada=", "line 1 has a name without a secret"),
        ("ada=hush\nada=other", "line 2 has a name that stands above"),
        ("# hush", "it names no secret"),
    ],
)
def test_what_cannot_be_read_stops_the_start_and_is_not_told(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "secrets"
    file.write_text(text)
    with pytest.raises(StartupError, match=f"SECRETS_FILE.*{why}") as refused:
        Settings.read(secrets_file=file)
    assert "hush" not in str(refused.value)
    with pytest.raises(StartupError, match="No such file"):
        Settings.read(secrets_file=tmp_path / "nowhere")


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of secrets that is looked at for every request."""
    monkeypatch.setattr(secrets_file, "LOOKED_AT_S", 0.0)
    file = tmp_path / "secrets"
    file.write_text(TEAM)
    return file


def served(**settings: Any) -> Any:
    """An app whose model does not load."""

    def nothing() -> Any:
        raise NotReady("loading")

    return create_app(Settings.read(**settings), nothing)


def statuses(app: Any, *given: dict[str, str]) -> list[int]:
    """What `/v1/capabilities` answers to each; 503 is let in, to a model that does not load."""

    async def asked() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://anywhere.example") as client:
            return [(await client.get("/v1/capabilities", headers=headers)).status_code for headers in given]

    return asyncio.run(asked())


ADA, BO, OWN = ({"X-SECRET-KEY": secret} for secret in ("first-key", "second=key", "own-key"))


def test_each_is_let_in_until_taken_out(team: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = served(secrets_file=team, secret="own-key")
    both = {**ADA, "Authorization": "Bearer second=key"}
    mixed = {**ADA, "Authorization": "Bearer wrong"}
    caplog.set_level(logging.INFO)
    assert statuses(app, ADA, BO, OWN, both, mixed, {}) == [503, 503, 503, 503, 401, 401]
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    assert [getattr(line, "caller", None) for line in lines] == ["ada", "bo@lab.example", None, "ada", None, None]
    team.write_text("bo@lab.example=third-key\n")
    assert statuses(app, ADA, BO, OWN, {"X-SECRET-KEY": "third-key"}) == [401, 401, 503, 503]


@pytest.mark.parametrize("change", [lambda file: file.write_text("rubbish"), os.remove])
def test_a_file_that_is_broken_later_changes_nothing(team: Path, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = served(secrets_file=team)
    change(team)
    assert statuses(app, ADA, {}) == [503, 401]
    assert any("The secrets read before still hold" in record.getMessage() for record in caplog.records)
    team.write_text("cy=fourth-key")
    assert statuses(app, ADA, {"X-SECRET-KEY": "fourth-key"}) == [401, 503]


def test_a_server_with_named_secrets_is_guarded(team: Path) -> None:
    assert Settings.read(secrets_file=team).is_guarded
    assert not Settings.read().is_guarded


def test_none_of_them_is_written_to_a_log(team: Path) -> None:
    redactor = Redactor.of(Settings.read(secrets_file=team))
    assert redactor.text("first-key and third-key") == f"{STARS} and third-key"
    team.write_text("ada=third-key")
    assert redactor.text("first-key and third-key") == f"first-key and {STARS}"


def test_it_is_looked_at_once_a_second(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text(TEAM)
    found = SecretsFile(file)
    file.unlink()
    assert found.named() is found.named()
