"""The environment as one value: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from neuronpedia_inference.errors import StartupError, UnknownSource
from neuronpedia_inference.settings import EMBEDDED_MODEL_ID, Settings, given_names, near_misses, variable


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def read(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings.read()


def test_defaults_serve_the_embedded_model_to_this_machine() -> None:
    settings = Settings.read()
    assert settings.model_id == settings.weights_id == settings.sae_model_id == EMBEDDED_MODEL_ID
    assert settings.is_embedded
    assert settings.sae_sets is None
    assert (settings.server_host, settings.server_port, settings.secret) == ("127.0.0.1", 5002, None)
    assert not settings.is_exposed


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ('["res-jb"]', ("res-jb",)),
        ('["res-jb", "att-kk"]', ("res-jb", "att-kk")),
        ('["res-jb att-kk"]', ("res-jb", "att-kk")),
        ("res-jb att-kk", ("res-jb", "att-kk")),
        ("res-jb res-jb", ("res-jb",)),
        ("[]", ()),
    ],
)
def test_sae_sets(monkeypatch: pytest.MonkeyPatch, text: str, sets: tuple[str, ...]) -> None:
    assert read(monkeypatch, SAE_SETS=text).sae_sets == sets


def test_patterns_may_begin_with_a_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, INCLUDE_SAE="[0-4]-res ^7-", EXCLUDE_SAE='["^3-"]')
    assert settings.include_sae == ("[0-4]-res", "^7-")
    assert settings.exclude_sae == ("^3-",)


def test_which_model_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, MODEL_ID="gemma-2-2b", OVERRIDE_MODEL_ID="gemma-2-2b-it")
    assert (settings.weights_id, settings.sae_model_id) == ("gemma-2-2b-it", "gemma-2-2b")
    settings = read(monkeypatch, CUSTOM_HF_MODEL_ID="deepseek-ai/distill")
    assert (settings.weights_id, settings.sae_model_id) == ("deepseek-ai/distill", "deepseek-ai/distill")


def test_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, SECRET="", SENTRY_DSN="", TOKEN_LIMIT="", SAE_SETS="")
    assert settings.secret is None
    assert settings.sentry_dsn is None
    assert settings.token_limit == 200
    assert settings.sae_sets is None


def test_a_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("TOKEN_LIMIT=300\nMAX_RESULTS=7\nUNKNOWN=1\n")
    settings = read(monkeypatch, TOKEN_LIMIT="400")
    assert (settings.token_limit, settings.max_results) == (400, 7)


def test_a_setting_that_goes_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert variable("request_timeout_s") == "REQUEST_LOCK_TIMEOUT"
    assert read(monkeypatch, REQUEST_LOCK_TIMEOUT="5").request_timeout_s == 5


def test_secrets_do_not_print(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, SECRET="open-sesame", SENTRY_DSN="https://key@host/1")
    assert settings.secret == SecretStr("open-sesame")
    assert "sesame" not in f"{settings!r} {settings} {settings.model_dump()}"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_addresses_are_exposed(host: str) -> None:
    assert Settings.read(server_host=host).is_exposed


@pytest.mark.parametrize(
    "environment",
    [
        {"TOKEN_LIMIT": "many"},
        {"TOKEN_LIMIT": "0"},
        {"MODEL_DTYPE": "float8"},
        {"DEVICE": "tpu"},
        {"SERVER_PORT": "70000"},
        {"SAE_SETS": '["res-jb"'},
        {"INCLUDE_SAE": "(("},
        {"MODEL_FROM_PRETRAINED_KWARGS": "{"},
        {"MODEL_FROM_PRETRAINED_KWARGS": "[]"},
        {"MAX_BODY_BYTES": "1"},
        {"LOG_LEVEL": "loud"},
        {"SENTRY_TRACES_SAMPLE_RATE": "2"},
        {"REQUEST_LOCK_TIMEOUT": "-1"},
    ],
)
def test_a_bad_value_stops_the_start_naming_the_variable(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    ((name, _),) = environment.items()
    with pytest.raises(StartupError) as caught:
        read(monkeypatch, **environment)
    line = str(caught.value)
    assert name.lower() in line.lower()
    assert "\n" not in line


def test_limits_that_exclude_every_completion() -> None:
    with pytest.raises(StartupError, match="MAX_TOKENS .* must exceed TOKEN_LIMIT"):
        Settings.read(token_limit=100, max_tokens=100)


def test_the_bad_value_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError) as caught:
        read(monkeypatch, SERVER_PORT="hunter2")
    assert "hunter2" not in str(caught.value)


def test_settings_do_not_change() -> None:
    settings: Any = Settings.read()
    with pytest.raises(ValueError, match="frozen"):
        settings.token_limit = 5


def test_every_setting_has_a_sentence() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith((".", "d")), name
        assert variable(name) == variable(name).upper()


def test_a_blank_secret_stops_the_start_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "  \t ")
    with pytest.raises(StartupError, match="SECRET: is nothing but blanks"):
        Settings.read()


def test_a_server_without_saes_says_what_gives_it_some() -> None:
    assert str(UnknownSource.named("source", "7-res", ())) == (
        "Unknown source '7-res'. This server has no SAEs: SAE_SETS or LOCAL_SAE_DIR give it some."
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "tpu"])
def test_a_device_that_is_none_is_answered_with_those_that_are(device: str) -> None:
    with pytest.raises(
        StartupError, match=f"^Bad setting. DEVICE: '{device}' is no device here; auto, cpu, mps, cuda and"
    ):
        Settings.read(device=device)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("TOKEN_LIMT", "TOKEN_LIMIT"),
        ("TOKENLIMIT", "TOKEN_LIMIT"),
        ("TOKNE_LIMIT", "TOKEN_LIMIT"),
        ("MAX_TOKEN", "MAX_TOKENS"),
        ("MAX_ROW", "MAX_ROWS"),
        ("SERCET", "SECRET"),
        ("SECRETS", "SECRET"),
        ("SENTRY_DNS", "SENTRY_DSN"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("DEVCE", "DEVICE"),
    ],
)
def test_a_name_that_is_nearly_a_setting_is_told_by_it(name: str, near: str) -> None:
    assert list(near_misses([name, near, "PATH"])) == [f"{name} is ignored: did you mean {near}?"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "PATH",
            "HOME",
            "LANG",
            "HOST",
            "PORT",
            "PWD",
            "OLDPWD",
            "SHLVL",
            "SHELL",
            "HOSTNAME",
            "USER",
            "TERM",
            "TMPDIR",
        ),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "VIRTUAL_ENV"),
        *("TMPDIR", "MODEL_DIR", "MODEL_PATH", "SECRET_KEY", "SERVICE", "LS_COLORS", "DISPLAY", "EDITOR", "MAX_JOBS"),
        *("HF_TOKEN", "HF_HOME", "MODAL_TOKEN_ID", "SENTRY_TRACE", "NEURONPEDIA_INFERENCE_CACHE", "LOGNAME"),
    ],
)
def test_names_of_others_are_left_alone(name: str) -> None:
    assert list(near_misses([name], {"CPU", "GPU", "REGION", "RETRIES", "HF_TOKEN"})) == []


def test_names_come_from_the_environment_and_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_TOPK=3\nTOKEN_LIMIT=9\n")
    monkeypatch.setenv("token_limt", "7")
    assert {"TOKEN_LIMT", "MAX_TOPK", "TOKEN_LIMIT"} <= given_names()
    told = [line for line in near_misses(given_names()) if "MAX_TOPK" in line or "LIMT" in line]
    assert told == ["MAX_TOPK is ignored: did you mean MAX_TOP_K?", "TOKEN_LIMT is ignored: did you mean TOKEN_LIMIT?"]
    assert Settings.read().token_limit == 9
