"""What a receipt says: everything that a text depended on, and proof that it was steered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from neuronpedia_inference.schemas.common import Reply

FORMAT = 1

Known = Annotated[
    Literal["known", "pending", "changed"],
    Field(
        description="`pending`: the digests are still being computed, by a thread of low priority that begins when the "
        "server is ready. `changed`: the files are not any more those that were loaded, or are in a format of which "
        "none are known."
    ),
]


class ReceiptFile(Reply):
    """A file, by its own name."""

    name: str = Field(description="Its name, without folders.")
    bytes: int = Field(description="Its size.")
    sha256: str = Field(description="SHA-256 of all of it.")


class ReceiptModel(Reply):
    """The model that wrote."""

    name: str = Field(description="What it is called; of a folder its own name.")
    status: Known
    files: list[ReceiptFile] = Field(description="Its configuration and weights; empty unless known.")
    sha256: str | None = Field(
        description="One digest for all of them: of what `sha256sum` prints for the files in order of their names."
    )


class ReceiptSource(Reply):
    """An SAE that was read whole."""

    source: str = Field(description="Its name.")
    status: Known
    files: list[ReceiptFile] = Field(description="Its weights; empty unless known.")


class ReceiptFeature(Reply):
    """A feature that steered, was watched, or was looked at by a condition."""

    source: str = Field(description="Its source.")
    index: int = Field(description="Its index.")
    norm: float | None = Field(description="Of its decoder row; null where it has none.")
    sha256: dict[str, str] = Field(
        description="Of all the numbers it was used with, by part (`decoder_row`, `encoder_column`, `bias`, "
        "`threshold` and others that its kind has): in float32, little-endian, norms folded in as they are used."
    )


class ReceiptMoment(Reply):
    """A token at which an edit acted. Numbers are read in the step that ran the token."""

    position: int = Field(description="Its place in prompt and text; 0 is the first token of the prompt.")
    token: str = Field(description="The token as text.")
    before: float = Field(
        description="The projection of what came to the edit's place on the direction it writes along, at unit length: "
        "before all edits of that place."
    )
    after: float = Field(description="The same behind all edits of that place.")
    activation_before: float | None = Field(
        description="Of an edit that reads a feature where it writes: the activation before; else null."
    )
    activation_after: float | None = Field(description="The same behind all edits of that place.")
    dose: float = Field(description="|after − before|, as a share of the norm of what came to that place.")


class ReceiptEdit(Reply):
    """One edit as it was applied."""

    field: str = Field(description="Where it stands in the request, such as `features.0`.")
    do: str = Field(description="What it does; the methods of `features` and `vectors` by their words for edits.")
    source: str | None = Field(description="Of a feature: its source; null for a vector.")
    index: int | None = Field(description="Of a feature: its index; null for a vector.")
    to: int | None = Field(description="Of a `swap` of features: the index of the one that gets the activation.")
    point: str = Field(description="Where it writes.")
    unit: Literal["absolute", "dose"] = Field(description="Of `amount`; parts of a maximum have been multiplied out.")
    amount: float = Field(description="By how much, multiplier and known maximum multiplied in.")
    norm: float | None = Field(description="Of the vector or decoder row before anything else is done with it.")
    vector_sha256: str | None = Field(description="Of a vector: digest of its numbers in float32, little-endian.")
    acted: bool | None = Field(
        description="Whether the projection was moved at any token that it selects; null where it has a condition and "
        "is not alone at its place, so that edits cannot be told apart."
    )
    first: ReceiptMoment | None = Field(description="The first token at which it was moved.")
    last: ReceiptMoment | None = Field(description="The last one.")


class ReceiptText(Reply):
    """A text that was written."""

    token_ids: list[int] = Field(description="Ids of its tokens, the one that ended it included.")
    tokens: list[str] = Field(description="The same as text.")
    finish_reason: str | None = Field(description="Why it ended.")


class Circumstances(Reply):
    """What texts depended on, beside their prompts and what steered them."""

    format: int = Field(description=f"{FORMAT}; it changes with the meaning of what follows.")
    operation: str = Field(description="The operation that was asked, such as `steer`.")
    versions: dict[str, str] = Field(description="Of this package, torch and transformers.")
    model: ReceiptModel = Field(description="The model.")
    device: str = Field(description="Kind of device: `cpu`, `cuda` or `mps`.")
    dtype: str = Field(description="Precision of the model.")
    products: dict[str, list[str]] = Field(
        description="On a CPU, by shape of the weights: how rows are multiplied with them, from few rows to many. "
        "Empty where torch's own products are used: elsewhere, and in reproducible answers."
    )
    reproducible: bool = Field(description="Whether the same request has the same bytes whatever else there is to do.")
    request: dict[str, Any] = Field(description="The request as it came, without what was left out of it.")
    sampling: dict[str, Any] = Field(
        description="How tokens were drawn, with defaults filled in; the seed too, unless every text has its own."
    )
    features: list[ReceiptFeature] = Field(description="Features of SAEs that were used, each once.")
    sources: list[ReceiptSource] = Field(description="SAEs that were read whole, for a watched `top_k`.")


class Receipt(Circumstances):
    """Everything that the texts depended on. `neuronpedia-inference replay FILE` runs it again and compares.

    It holds the prompt, and goes to whoever asked and nowhere else: never to a log. No path and no name of a machine is
    in it.
    """

    prompt_ids: list[int] = Field(description="Ids of the prompt's tokens, as the model read them.")
    prompt_tokens: list[str] = Field(description="The same as text.")
    edits: list[ReceiptEdit] = Field(description="What `steered` was edited by, in order.")
    steered: ReceiptText = Field(description="The steered text.")
    default: ReceiptText | None = Field(description="The unsteered text; null when `compare` is false.")


class ReceiptPrompt(Reply):
    """A prompt of a sweep."""

    token_ids: list[int] = Field(description="Ids of its tokens, as the model read them.")
    tokens: list[str] = Field(description="The same as text.")


class ReceiptCell(Reply):
    """A text of a sweep."""

    prompt: int = Field(description="Place of its prompt in the list.")
    steering: int | None = Field(description="Place of what steers it; null for an unsteered text.")
    strength: float | None = Field(description="Its strength; null for an unsteered text.")
    seed: int = Field(description="Its seed.")
    edits: list[ReceiptEdit] = Field(description="What it was edited by, in order.")
    text: ReceiptText = Field(description="What was written.")


class SweepReceipt(Circumstances):
    """Everything that the texts of a sweep depended on; as the receipt of `steer`, and run again like it."""

    prompts: list[ReceiptPrompt] = Field(description="The prompts, in order.")
    cells: list[ReceiptCell] = Field(description="Every text in the order in which it was told, unsteered ones too.")
