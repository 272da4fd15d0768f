"""Every setting: variable, type, default, bound and meaning, in one place. Nothing else reads the environment."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict, SettingsError

from neuronpedia_inference import load_options
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.secrets_file import SecretsFile

EMBEDDED_MODEL_ID = "smollm2-135m-instruct"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NOT_FOR_US = ("MODAL_", "HF_", "NPM_", "PIP_")
LETTERS = (5, 10)
"""From how many letters on a name with one or two others is taken for the same: shorter ones are other words."""

JsonList = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """The environment as one frozen value. The variable of a field is its name in capitals."""

    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        validate_by_name=True,
        validate_by_alias=True,
    )

    # Model and SAEs
    model_id: str = Field(
        EMBEDDED_MODEL_ID,
        description="Model to serve: the embedded one, a short or Hugging Face name, or a local folder.",
    )
    override_model_id: str | None = Field(
        None, description="Weights to load instead of MODEL_ID's, keeping MODEL_ID's SAEs."
    )
    custom_hf_model_id: str | None = Field(
        None, description="Hugging Face weights; wins over both ids and is used to look up the SAEs."
    )
    sae_sets: JsonList | None = Field(
        None,
        description="Source sets, sources, or where SAEs are (`release/sae_id`, `hf://owner/repo/path`, `./folder`; "
        "`NAME=` before it calls one otherwise), a JSON list or words. Unset: `res-4k` for the embedded model, every "
        "set in LOCAL_SAE_DIR if that is given, else the model's first canonical residual set. `[]` serves no SAEs.",
    )
    local_sae_dir: Path | None = Field(
        None,
        description="Folder of SAE folders named by source (`7-res-jb/`), or one of these, used before the directory: "
        "as SAELens or dictionary_learning write them.",
    )
    labels_dir: Path | None = Field(
        None,
        description="Folder of labels, densities, maxima and contexts of features: JSON lines (also gzipped) or "
        "Parquet, a row a feature, or Neuronpedia's export as it is. What it says wins over what comes with the SAEs.",
    )
    variants: Path | None = Field(
        None,
        description="File `NAME.json`, or folder of them, that says what to steer with as `/v1/steer` takes it "
        "(`features`, `vectors`, `edits`): each is a model `MODEL+NAME` of OpenAI's routes.",
    )
    persona_dir: Path | None = Field(
        None,
        description="Folder of persona axes (`persona.json`, `persona.safetensors`), or of such folders named by "
        "model. Unset: the embedded model has its own, others have none.",
    )
    include_sae: JsonList = Field((), description="Regular expressions; keep only sources that one matches.")
    exclude_sae: JsonList = Field((), description="Regular expressions; drop sources that one matches.")
    model_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Precision of the model's weights; `auto` takes the checkpoint's own."
    )
    sae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32", description="Precision of the SAEs' weights; `auto` keeps that of each file."
    )
    max_loaded_saes: int = Field(
        300, ge=1, description="SAEs kept whole in host memory; the least recently used leave first."
    )
    sae_host_gib: float | None = Field(
        None,
        gt=0,
        description="GiB of SAEs kept whole in host memory; the least recently used leave first. Single features "
        "are read from files and do not count. Unset: seven tenths of what is free once the model is loaded.",
    )
    sae_memory_gib: float | None = Field(
        None,
        gt=0,
        description="GiB of SAEs kept on the device; the least recently used leave first and come back when asked for. "
        "Unset: seven tenths of what is free once the model is loaded.",
    )
    download_on_request: bool = Field(
        False,
        description="Fetch an SAE that a request names, where SAELens's directory lists it for the model and it is not "
        "served yet. Meanwhile requests for it get a 503, and all others are answered.",
    )
    download_file_gib: float = Field(8.0, gt=0, description="GiB of one file that is fetched for a request, at most.")
    download_total_gib: float = Field(
        64.0, gt=0, description="GiB of all files that one process fetches for requests, at most."
    )
    jlens_source: str | None = Field(
        None,
        description="Jacobians of the Jacobian lens: a file (safetensors, or torch's as Neuronpedia publishes them), a "
        "folder that holds one, `hf://owner/repo/path`, or `none`. Unset: the embedded model's own; for others what "
        "JLENS_HF_REPO has, which is fetched when the model is.",
    )
    jlens_hf_repo: str = Field(
        "neuronpedia/jacobian-lens", description="Repository on the hub with the Jacobians of many models."
    )
    jlens_dataset: str = Field("Salesforce-wikitext", description="On which texts those were made.")
    model_from_pretrained_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="JSON object passed to Hugging Face's `from_pretrained`, such as "
        '`{"revision": "main", "subfolder": "model"}`. What says where files are (`revision`, `subfolder`, `token`, '
        "`cache_dir`, `gguf_file`) reaches the tokenizer too. What another setting says, and what no longer has an "
        "effect, is refused.",
    )
    device: str = Field("auto", description="auto, cpu, mps or cuda[:N].")
    num_threads: int = Field(
        0, ge=0, le=1024, description="CPU threads for tensors; 0 leaves one core free for the server."
    )
    cuda_graphs: bool = Field(
        False,
        description="Replay decode steps as CUDA graphs. They are compared with ordinary steps at start; where they "
        "cannot be used `/v1/capabilities` says why.",
    )

    # Limits
    token_limit: int = Field(200, ge=1, description="Tokens in a prompt, BOS included; a batch gets a quarter each.")
    lens_token_limit: int = Field(1024, ge=1, description="Tokens in the prompt of a lens, BOS included.")
    max_tokens: int = Field(4096, ge=2, description="Tokens of prompt and completion together.")
    max_results: int = Field(1000, ge=1, description="Upper bound of `num_results`.")
    max_top_k: int = Field(256, ge=1, description="Upper bound of `top_k`.")
    max_result_values: int = Field(
        2**22, ge=1, description="Activations in one answer: results or `top_k` times tokens, or all that are not zero."
    )
    max_sweep_texts: int = Field(256, ge=1, description="Texts of one sweep, the unsteered ones too.")
    max_sweep_tokens: int = Field(
        32768, ge=1, description="New tokens of one sweep: `max_new_tokens` times its texts, the unsteered ones too."
    )
    max_concurrent_requests: int = Field(32, ge=1, description="Requests admitted at once; more get a 503.")
    max_rows: int = Field(
        16, ge=1, le=256, description="Completions that decode together; more take turns, a new one first."
    )
    max_queued_tokens: int = Field(
        32768, ge=1, description="Prompt tokens of all requests inside, waiting or running; more get a 503."
    )
    request_memory_gib: float | None = Field(
        None,
        gt=0,
        description="GiB that all requests inside may take; more get a 503. Unset: half of what is free once the model "
        "is loaded, less what its SAEs may take.",
    )
    reuse_memory_gib: float | None = Field(
        None,
        ge=0,
        description="GiB of what was computed of recent prompts, kept for whoever asks of them again; 0 keeps nothing. "
        "Unset: a thirty-second of the memory of requests, at most 1 GiB.",
    )
    kept_vectors_mib: float = Field(
        64.0,
        ge=0,
        description="MiB of vectors that callers have sent to be kept (`PUT /v1/vectors`), the least recently used "
        "leaving first; 0 keeps none. Whoever has the secret shares them.",
    )
    reproducible: bool = Field(
        False,
        description="Every request has the same bytes whatever else there is to do, and after a restart, as with the "
        "field `reproducible`: its rows and prompts run by themselves, and nothing is used again.",
    )
    request_timeout_s: float = Field(
        300.0,
        ge=0,
        validation_alias="REQUEST_LOCK_TIMEOUT",
        description="Seconds that a request may wait for its turn; 0 waits for ever.",
    )
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Bytes in a request body.")
    max_connections: int = Field(
        1000,
        ge=8,
        description="Connections open at once; for one more, the one that has waited longest for its caller is closed. "
        "Never more than the files that the process may open, but for 64.",
    )
    receive_timeout_s: float = Field(
        60.0,
        ge=0.1,
        le=86400,
        validation_alias="RECEIVE_TIMEOUT",
        description="Seconds in which the body of a request must have come in.",
    )
    send_timeout_s: float = Field(
        60.0,
        ge=0.1,
        le=86400,
        validation_alias="SEND_TIMEOUT",
        description="Seconds for which a caller may take nothing of an answer before it is cut off.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=86400,
        validation_alias="DRAIN_TIMEOUT",
        description="Seconds that running requests have once the server is told to stop; then they end in an error.",
    )
    strict_model: bool = Field(False, description="Refuse requests whose `model` is not the one served.")
    chatml_fallback: bool = Field(False, description="Render chats as ChatML when the model has no template.")

    # Server
    server_host: str = Field("127.0.0.1", description="Address to bind; others than loopback need a SECRET.")
    server_port: int = Field(5002, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    secret: SecretStr | None = Field(
        None, description="Value that `X-SECRET-KEY`, or `Authorization: Bearer`, must have; unset or empty: open."
    )
    secrets_file: Path | None = Field(
        None,
        description="File with further secrets, each with the name of who has it: `name=secret` in a line. Changes "
        "hold within a second, without a restart.",
    )
    allowed_hosts: JsonList = Field(
        (),
        description="Names by which callers may reach the server (the `Host` of requests, without port; "
        "`*.example.org` and `*` are understood), beside loopback and SERVER_HOST. Unset: any with a SECRET, no other "
        "without.",
    )
    allowed_origins: JsonList = Field(
        (),
        description="Web pages that may call the server (`https://example.org`, `null` or `*`), beside those on "
        "loopback and its own. Unset: any with a SECRET, no other without.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["text", "json"] = Field("text", description="Form of log lines.")

    # Monitoring
    sentry_dsn: SecretStr | None = Field(None, description="Sentry project; unset: Sentry is off.")
    sentry_environment: str = Field("development", description="Sentry environment.")
    sentry_release: str | None = Field(None, description="Sentry release.")
    sentry_traces_sample_rate: float = Field(0.25, ge=0, le=1, description="Share of requests traced by Sentry.")
    sentry_profiles_sample_rate: float = Field(0.25, ge=0, le=1, description="Share of processes profiled by Sentry.")

    @field_validator("sae_sets", "include_sae", "exclude_sae", "allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        return _words(value) if isinstance(value, str) else value

    @field_validator("sae_sets", mode="after")
    @classmethod
    def _split_sets(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else tuple(dict.fromkeys(word for name in value for word in name.split()))

    @field_validator("include_sae", "exclude_sae", mode="after")
    @classmethod
    def _compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as exc:
                raise ValueError(f"{pattern!r} is not a regular expression: {exc}") from exc
        return value

    @field_validator("device", mode="after")
    @classmethod
    def _is_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", value) is None:
            raise ValueError(f"{value!r} is no device here; auto, cpu, mps, cuda and cuda:0 (or another number) are")
        return value

    @field_validator("model_from_pretrained_kwargs", mode="after")
    @classmethod
    def _are_taken(cls, value: dict[str, Any]) -> dict[str, Any]:
        load_options.check(value)
        return value

    @field_validator("secret", mode="after")
    @classmethod
    def _can_be_sent(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and value.get_secret_value() and not value.get_secret_value().strip():
            raise ValueError("is nothing but blanks, which no header can carry")
        return value

    @field_validator("secrets_file", mode="after")
    @classmethod
    def _can_be_read(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                SecretsFile(value.expanduser())
            except OSError as exc:
                raise ValueError(f"{str(value)!r} cannot be read: {exc.strerror}") from None
        return None if value is None else value.expanduser()

    @field_validator("secret", "sentry_dsn", mode="after")
    @classmethod
    def _empty_is_unset(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value is not None and value.get_secret_value() else None

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.max_tokens <= self.token_limit:
            raise ValueError(
                f"MAX_TOKENS ({self.max_tokens}) must exceed TOKEN_LIMIT ({self.token_limit}), or nothing is generated"
            )
        return self

    @classmethod
    def read(cls, **overrides: Any) -> Settings:
        """Settings from the environment and `.env`; `overrides` win. Raises StartupError naming the variable."""
        try:
            return cls(**overrides)
        except ValidationError as exc:
            raise StartupError(_one_line(exc)) from None
        except SettingsError as exc:
            raise StartupError(f"Bad setting. {exc}: not valid JSON") from None

    @property
    def is_embedded(self) -> bool:
        return self.weights_id == EMBEDDED_MODEL_ID

    @property
    def weights_id(self) -> str:
        """The model whose weights are loaded."""
        return self.custom_hf_model_id or self.override_model_id or self.model_id

    @property
    def weights_variable(self) -> str:
        """The variable that names them."""
        own = ("custom_hf_model_id", "override_model_id")
        return next((variable(name) for name in own if getattr(self, name)), "MODEL_ID")

    @property
    def sae_model_id(self) -> str:
        """The model whose SAEs are looked up."""
        return self.custom_hf_model_id or self.model_id

    @property
    def sae_model_variable(self) -> str:
        """The variable that names it."""
        return variable("custom_hf_model_id") if self.custom_hf_model_id else "MODEL_ID"

    def read_secrets(self) -> SecretsFile | None:
        """Those of SECRETS_FILE, which was readable when the settings were read."""
        return None if self.secrets_file is None else SecretsFile(self.secrets_file)

    @property
    def is_guarded(self) -> bool:
        """Whether callers need a secret."""
        return self.secret is not None or self.secrets_file is not None

    @property
    def is_exposed(self) -> bool:
        """True when the server would listen to other machines."""
        return self.server_host not in LOOPBACK


def variable(field: str) -> str:
    """The environment variable that sets a field."""
    alias = Settings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else field.upper()


def given_names() -> set[str]:
    """Every variable of the environment and of `.env`, in capitals: settings are read in any."""
    return {name.upper() for name in (*os.environ, *DotEnvSettingsSource(Settings).env_vars)}


def near_misses(names: Iterable[str], others: Collection[str] = ()) -> Iterator[str]:
    """A line for each variable that is nearly a setting, or one of `others`: it is ignored otherwise without a word."""
    known = {*map(variable, Settings.model_fields), *others}
    for name in sorted(names):
        if name not in known and not name.startswith(NOT_FOR_US):
            near = max(known, key=lambda one: (_likeness(name, one), one))
            if _likeness(name, near) > 0:
                yield f"{name} is ignored: did you mean {near}?"


def _likeness(name: str, known: str) -> float:
    """0 unless one letter differs, of a long name two; letters that have changed places are one that differs."""
    length = max(len(name), len(known))
    n_apart = sum(length >= least for least in LETTERS)
    least = 1 - n_apart / length - 1e-9
    compared = SequenceMatcher(None, name, known, autojunk=False)
    if min(compared.real_quick_ratio(), compared.quick_ratio()) < least:
        return 0.0
    return compared.ratio() if compared.ratio() >= least else 0.0


def _words(text: str) -> Any:
    """A JSON list, or words; `[0-9]-res` is a word."""
    return json.loads(text) if re.match(r'\s*\[\s*["\]]', text) else text.split()


def _one_line(exc: ValidationError) -> str:
    """Every bad variable with its problem; the value itself stays out, it may be a secret."""
    problems = []
    for error in exc.errors():
        where = str(error["loc"][0]).upper() if error["loc"] else ""
        problem = error["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {problem}" if where else problem)
    return "Bad setting. " + "; ".join(problems)
