"""lens/prompt on a port, against Hugging Face's model with hooks by hand, its final norm and its head."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import torch
from refusing import busy, no_jacobians
from safetensors.torch import load_file
from served import BOS, MODEL, Serve, Wrapped, small_settings
from test_stream import FailingAfter
from torch import Tensor

from neuronpedia_inference import embedded
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.errors import EngineFailed
from neuronpedia_inference.runtime import Runtime

PROMPT = "The capital of France is"
ASKED: dict[str, Any] = {"model": MODEL, "type": ["LOGIT_LENS"], "prompt": PROMPT, "temperature": 0, "top_n": 5}
LAST = 29
# The told probabilities are rounded to 4 decimals; sums in another order move them by far less than one of these.
ROUNDED = 1.01e-4
Hook = Callable[[Tensor], Tensor]


class Plain:
    """The model by itself."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
        self.strings = [self.tokenizer.decode([token_id]) for token_id in range(self.model.config.vocab_size)]
        self.is_word = torch.tensor([is_word(text) for text in self.strings])

    @torch.no_grad()
    def states(self, ids: Sequence[int], edits: Mapping[int, Hook] | None = None) -> list[Tensor]:
        """[pos, width] behind every block, of which some are edited."""
        found: list[Tensor] = []

        def behind(layer: int, output: Tensor) -> Tensor:
            changed = output if edits is None or layer not in edits else edits[layer](output[0])[None]
            found.append(changed[0])
            return changed

        with ExitStack() as stack:
            for layer, block in enumerate(self.model.model.layers):
                hook = block.register_forward_hook(lambda _m, _i, output, layer=layer: behind(layer, output))
                stack.callback(hook.remove)
            self.model(torch.tensor([list(ids)]), use_cache=False)
        return found

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(states))

    def greedy(self, ids: Sequence[int], n: int, edits: Callable[[int], Mapping[int, Hook]]) -> list[int]:
        """n tokens more; edits: by the length of the text."""
        text = list(ids)
        for _ in range(n):
            text.append(int(self.logits(self.states(text, edits(len(text)))[-1][-1]).argmax()))
        return text

    def unit(self, token: str) -> Tensor:
        row = self.model.lm_head.weight[self.strings.index(token)]
        return (row / row.norm()).detach()


def is_word(text: str) -> bool:
    """By its characters, as contract 4.5 says it."""
    inner = text.strip()
    if not inner or "<|" in inner or (inner[0] == "<" and inner[-1] == ">"):
        return False
    is_letter = [character.isalpha() or character.isnumeric() for character in inner]
    joins = [place for place, is_one in enumerate(is_letter) if not is_one]
    inside = range(1, len(inner) - 1)
    return all(
        place in inside and inner[place] in "'-’" and is_letter[place - 1] and is_letter[place + 1] for place in joins
    )


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain()


def lines(http: httpx.Client, **changes: Any) -> list[dict[str, Any]]:
    """The frames, as they are streamed."""
    with http.stream("POST", "/v1/lens/prompt", json={**ASKED, **changes}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.iter_lines()]


def whole(http: httpx.Client, **changes: Any) -> dict[str, Any]:
    answer = http.post("/v1/lens/prompt", json={**ASKED, "stream": False, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(tokens: Sequence[Mapping[str, Any]]) -> list[int]:
    return [one["id"] for one in tokens]


def compare(
    plain: Plain,
    frames: Sequence[Mapping[str, Any]],
    behind: Mapping[int, Tensor],
    lens: int = 0,
    *,
    words: bool = True,
) -> None:
    """The frames' tokens and probabilities against the states behind blocks, by hand; positions are those of frames."""
    places = [frame["position"] for frame in frames]
    for number, (layer, states) in enumerate(behind.items()):
        logits = plain.logits(states)[places]
        probabilities = logits.softmax(-1)
        ranked = logits.masked_fill(~plain.is_word, -torch.inf) if words else logits.clone()
        if layer == LAST:
            first = logits.argmax(-1)
            ranked[torch.arange(len(places)), first] = torch.inf
        for place, frame in enumerate(frames):
            result = frame["results"][lens]
            tokens, probs = result["top_tokens"][number], result["top_probs"][number]
            wanted = ranked[place].topk(len(tokens)).indices
            assert probs == pytest.approx(probabilities[place][wanted].tolist(), abs=ROUNDED), (layer, place)
            told = [plain.strings[token_id] for token_id in wanted.tolist()]
            clear = [n for n in range(len(tokens) - 1) if probs[n] - probs[n + 1] > 2 * ROUNDED]
            firm = clear[0] + 1 if clear and clear == list(range(len(clear))) else 0
            assert tokens[:firm] == told[:firm]


def test_every_block_and_position_is_read_out_as_by_hand(http: httpx.Client, plain: Plain) -> None:
    meta, prompt, *frames, done = lines(http)
    ids = ids_of(prompt["tokens"])
    assert plain.strings[ids[0]] == BOS
    assert ids == plain.tokenizer(BOS + PROMPT)["input_ids"] == ids_of(frames)
    assert meta == {
        "kind": "meta",
        "model": MODEL,
        "types": ["LOGIT_LENS"],
        "layers_by_type": {"LOGIT_LENS": list(range(LAST + 1))},
        "top_n": 5,
        "prompt_len": len(ids),
        "num_completion_tokens": 0,
        "temperature": 0.0,
        "prepend_bos": True,
        "reuse_len": 0,
    }
    about = {"is_generated": False, "is_char_continuation": False}
    nothing = dict.fromkeys(("message_index", "role", "channel", "section"))
    for place, (token, frame) in enumerate(zip(prompt["tokens"], frames, strict=True)):
        assert token == {"position": place, "token": plain.strings[ids[place]], "id": ids[place], **about, **nothing}
        assert frame.items() >= {**token, "kind": "token"}.items()
        assert frame.keys() == {*token, "kind", "results"}
    assert done == {"kind": "done", "seq_len": len(ids), "prompt_len": len(ids), "vocab_size": 49152, "completion": ""}
    compare(plain, frames, dict(enumerate(plain.states(ids))))
    # Behind the last block the model's own likeliest token is told, word or not; in this prompt it is none once.
    own = plain.logits(plain.states(ids)[-1]).argmax(-1)
    assert [frame["results"][0]["top_tokens"][-1][0] for frame in frames] == [plain.strings[i] for i in own]
    assert not plain.is_word[own].all()


def test_without_the_filter_every_token_may_be_told(http: httpx.Client, plain: Plain) -> None:
    told = whole(http, filter_non_word_tokens=False, layers=[3, 12, 99])
    assert told["meta"]["layers_by_type"] == {"LOGIT_LENS": [3, 12, LAST]}
    states = plain.states(ids_of(told["tokens"]))
    compare(plain, told["tokens"], {layer: states[layer] for layer in (3, 12, LAST)}, words=False)
    shown = {token for frame in told["tokens"] for of in frame["results"][0]["top_tokens"] for token in of}
    assert not all(map(is_word, shown))


def test_generated_tokens_are_read_like_those_of_a_prompt(http: httpx.Client, plain: Plain) -> None:
    """Greedy, against the model by hand; and the finished text as ids gives the same frames and generates nothing."""
    asked = {"layers": [10, 20], "num_completion_tokens": 5}
    _, prompt, *frames, done = lines(http, **asked)
    n_prompt = len(prompt["tokens"])
    ids = ids_of(frames)
    assert ids == plain.greedy(ids[:n_prompt], 5, lambda _: {})
    assert [frame["is_generated"] for frame in frames] == [False] * n_prompt + [True] * 5
    assert done["completion"] == plain.tokenizer.decode(ids[n_prompt:])
    states = plain.states(ids)
    compare(plain, frames, {layer: states[layer] for layer in (10, 20, LAST)})
    again = whole(http, **asked, prompt=None, input_token_ids=ids)
    assert (again["meta"]["num_completion_tokens"], again["done"]["seq_len"]) == (0, len(ids))
    compare(plain, again["tokens"], {layer: states[layer] for layer in (10, 20, LAST)})


def test_what_the_caller_has_is_not_told_again(http: httpx.Client) -> None:
    full = whole(http, layers=[10])["tokens"]
    known = [*ids_of(full)[:4], 7]
    meta, prompt, *frames, _ = lines(http, layers=[10], cached_token_ids=known, num_completion_tokens=1)
    assert (meta["reuse_len"], len(prompt["tokens"])) == (4, len(full))
    assert [frame["position"] for frame in frames] == [4, 5, 6]
    for frame, wanted in zip(frames, full[4:], strict=False):
        found, expected = (one["results"][0]["top_probs"] for one in (frame, wanted))
        assert sum(found, []) == pytest.approx(sum(expected, []), abs=ROUNDED)
    assert [one["position"] for one in lines(http, layers=[10], cached_token_ids=ids_of(full))[2:-1]] == []
    steered = {"steer_tokens": [{"token": " Paris", "type": "LOGIT_LENS"}], "steer_layers": [5], "steer_ablate": True}
    assert lines(http, layers=[10], cached_token_ids=known, **steered)[0]["reuse_len"] == 0


# Interventions

STRENGTH = 0.4


def hooks_of(plain: Plain, how: str, n_edited: int | None = None) -> Hook:
    """By the formulas of contract 4.5, at every position but BOS; n_edited: only so many positions of the beginning."""
    delta = plain.unit(" Paris") + plain.unit(" London")
    along, to = delta / delta.norm(), plain.unit(" banana")

    def edit(hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        for place in range(1, len(hidden) if n_edited is None else n_edited):
            h = hidden[place]
            if how == "steer":
                added = STRENGTH * h.norm() * delta
                changed[place] = h + added * min(1.0, float(h.norm() / added.norm()))
            elif how == "capped":
                added = 3 * h.norm() * delta
                changed[place] = h + added * min(1.0, float(h.norm() / added.norm()))
            else:
                changed[place] = h - (h @ along) * along + (h @ along) * to * (how == "swap")
        return changed

    return edit


HOW: dict[str, dict[str, Any]] = {
    "steer": {"steer_strength": STRENGTH},
    "capped": {"steer_strength": 3},
    "ablate": {"steer_strength": STRENGTH, "steer_ablate": True},
    "swap": {"steer_strength": 1, "steer_ablate": True, "swap_token": {"token": " banana", "type": "LOGIT_LENS"}},
}


@pytest.mark.parametrize("how", HOW)
def test_interventions_are_those_written_by_hand(http: httpx.Client, plain: Plain, how: str) -> None:
    tokens = [{"token": token, "type": "LOGIT_LENS"} for token in (" Paris", "London ")]  # the second but for blanks
    layers = [12, 20]
    told = whole(http, layers=[11, 12, 20], steer_tokens=tokens, steer_layers=layers, **HOW[how])["tokens"]
    ids = ids_of(told)
    states = plain.states(ids, dict.fromkeys(layers, hooks_of(plain, how)))
    compare(plain, told, {layer: states[layer] for layer in (11, 12, 20, LAST)})
    unedited = whole(http, layers=[11, 12, 20])["tokens"]
    assert told[0]["results"] == unedited[0]["results"], "BOS is left as it is"
    assert told[-1]["results"][0]["top_probs"][0] == unedited[-1]["results"][0]["top_probs"][0], "before block 12"
    assert told[-1]["results"][0]["top_probs"][1:] != unedited[-1]["results"][0]["top_probs"][1:]


@pytest.mark.parametrize("everywhere", [False, True])
def test_generated_tokens_are_steered_if_that_is_asked_for(http: httpx.Client, plain: Plain, everywhere: bool) -> None:
    tokens = [{"token": token, "type": "LOGIT_LENS"} for token in (" Paris", " London")]
    steered = {"steer_tokens": tokens, "steer_layers": [20], "steer_strength": STRENGTH}
    asked = {"layers": [20], "num_completion_tokens": 3, "steer_generated_tokens": everywhere, **steered}
    told = whole(http, **asked)["tokens"]
    n_prompt = sum(not one["is_generated"] for one in told)
    edit = hooks_of(plain, "steer", None if everywhere else n_prompt)
    ids = plain.greedy(ids_of(told)[:n_prompt], 3, lambda _: {20: edit})
    assert ids == ids_of(told)
    assert ids != plain.greedy(ids[:n_prompt], 3, lambda _: {})
    states = plain.states(ids, {20: edit})
    compare(plain, told, {20: states[20], LAST: states[LAST]})


# The Jacobian lens


def fitted_matrices() -> dict[int, Tensor]:
    """[d_out, d_in] by block, as they are shipped."""
    return {int(name): matrix.float() for name, matrix in load_file(embedded.JACOBIANS).items()}


def test_the_jacobian_lens_is_the_logit_lens_of_what_the_jacobian_gives(http: httpx.Client, plain: Plain) -> None:
    jacobians = fitted_matrices()
    fitted = sorted(jacobians)
    told = whole(http, type=["JACOBIAN_LENS", "LOGIT_LENS", "JACOBIAN_LENS"], layers=[fitted[0], fitted[-1]])
    assert told["meta"]["types"] == ["JACOBIAN_LENS", "LOGIT_LENS"]
    states = plain.states(ids_of(told["tokens"]))
    read = {layer: states[layer] @ jacobians[layer].T for layer in (fitted[0], fitted[-1])}
    compare(plain, told["tokens"], {**read, LAST: states[LAST]})
    compare(plain, told["tokens"], {layer: states[layer] for layer in (fitted[0], fitted[-1], LAST)}, 1)
    whole_lens = whole(http, type=["JACOBIAN_LENS"])["meta"]["layers_by_type"]["JACOBIAN_LENS"]
    assert whole_lens == [*fitted, LAST]


def test_a_token_by_its_jacobian_is_steered_with(http: httpx.Client, plain: Plain) -> None:
    jacobians = fitted_matrices()
    layer = min(jacobians)
    row = jacobians[layer].T @ plain.unit(" Paris")

    def edit(hidden: Tensor) -> Tensor:
        added = STRENGTH * hidden.norm(dim=-1, keepdim=True) * row / row.norm()
        added[0] = 0
        return hidden + added

    steered = {"steer_tokens": [{"token": " Paris", "type": "JACOBIAN_LENS"}], "steer_strength": STRENGTH}
    told = whole(http, layers=[layer], steer_layers=[layer], **steered)["tokens"]
    states = plain.states(ids_of(told), {layer: edit})
    compare(plain, told, {layer: states[layer], LAST: states[LAST]})


def test_a_watch_reads_by_the_same_jacobian(http: httpx.Client, plain: Plain) -> None:
    jacobians = fitted_matrices()
    layer = min(jacobians)
    body = {"prompt": PROMPT, "max_new_tokens": 2, "features": []}
    watch = [{"lens": "JACOBIAN_LENS", "layers": [layer], "top_n": 3}]
    answer = http.post("/v1/steer", json={**body, "watch": watch})
    assert answer.status_code == 200, answer.text
    text = answer.json()["default"] or answer.json()["steered"]
    ids = plain.tokenizer("".join(text["watch"]["tokens"]))["input_ids"]
    logprobs = plain.logits(plain.states(ids)[layer] @ jacobians[layer].T).log_softmax(-1)
    for place, [of_layer] in enumerate(text["watch"]["values"][0]["after"]):
        found = [one["logprob"] for one in of_layer["top"]]
        assert found == pytest.approx(logprobs[place].topk(3).values.tolist(), abs=1e-3)


# Prompts


def test_a_chat_says_what_each_token_belongs_to(http: httpx.Client, plain: Plain) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    told = lines(http, prompt=None, chat=chat, layers=[5], num_completion_tokens=2)
    spans = http.post("/v1/apply-chat-template", json={"messages": chat, "add_generation_prompt": True}).json()["spans"]
    _, prompt, *frames, _ = told
    for token, span in zip(prompt["tokens"], spans, strict=True):
        shared = {"position": "position", "id": "token_id", "token": "token_str", "message_index": "message_index"}
        assert {key: token[key] for key in shared} == {key: span[name] for key, name in shared.items()}
        assert (token["role"], token["section"]) == (span["role"], span["section"])
    assert [(one["message_index"], one["role"], one["section"]) for one in frames[-2:]] == [
        (None, "assistant", "content")
    ] * 2


def test_a_last_message_of_the_assistant_goes_on(http: httpx.Client, plain: Plain) -> None:
    chat = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,\n"}]
    told = whole(http, prompt=None, chat=chat, layers=[5], num_completion_tokens=2)
    frames = told["tokens"]
    text = plain.tokenizer.decode(ids_of(frames)[: told["meta"]["prompt_len"]])
    assert text == plain.tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    last = [one for one in frames if one["message_index"] == 1]
    assert [one["section"] for one in last][-4:] == ["content"] * 4
    assert [one["is_generated"] for one in last][-2:] == [True, True]


def test_parts_of_a_character_carry_all_of_it(http: httpx.Client) -> None:
    told = lines(http, prompt="a 🦙 b", layers=[5], max_seq_len=8)
    pieces = [one for one in told[1]["tokens"] if "🦙" in one["token"]]
    assert len(pieces) > 1
    assert len({one["token"] for one in pieces}) == 1
    assert [one["is_char_continuation"] for one in pieces] == [False] + [True] * (len(pieces) - 1)
    assert [one["token"] for one in told[2:-1]] == [one["token"] for one in told[1]["tokens"]]


def test_a_prompt_is_cut_and_may_begin_without_bos(http: httpx.Client, plain: Plain) -> None:
    told = whole(http, prepend_bos=False, max_seq_len=3, layers=[5])
    assert ids_of(told["tokens"]) == plain.tokenizer(PROMPT)["input_ids"][:3]


# Errors

STEERED = {"steer_layers": [3], "steer_strength": 1}
PARIS = {"token": " Paris", "type": "LOGIT_LENS"}
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": None}, 400, "Exactly one of prompt and chat"),
    ({"chat": [{"role": "user", "content": "x"}]}, 400, "Exactly one of prompt and chat"),
    ({"type": []}, 400, "type: name at least one"),
    ({"temperature": -0.1}, 400, "temperature is -0.1, the least is 0"),
    ({"temperature": 101}, 400, "the most is 100"),
    ({"num_completion_tokens": -1}, 400, "num_completion_tokens is -1, the least is 0"),
    ({"top_n": 0}, 400, "top_n is 0, the least is 1"),
    ({"top_n": 257}, 400, "top_n is 257, the most is 256"),
    ({"max_seq_len": 0}, 400, "max_seq_len is 0, the least is 1"),
    ({"prompt": "", "prepend_bos": False}, 400, "The prompt has no tokens"),
    ({"prompt": None, "chat": []}, 400, "chat: at least one message"),
    ({"prompt": "word " * 1100}, 400, "This conversation is too long (1102 tokens). The maximum is 1024 tokens"),
    ({"prompt": None, "input_token_ids": [5] * 1025}, 400, "(1025 tokens). The maximum is 1024 tokens"),
    ({"prompt": None, "input_token_ids": [1, 49152]}, 400, "input_token_ids: 49152 is no token"),
    ({"num_completion_tokens": 5000}, 400, "No room to generate"),
    (
        {**STEERED, "steer_tokens": [{"token": "nosuchtoken", "type": "LOGIT_LENS"}]},
        400,
        "steer_tokens: 'nosuchtoken' is no",
    ),
    ({**STEERED, "steer_layers": [30], "steer_tokens": [PARIS]}, 400, "steer_layers: 30 is none of this model's"),
    ({**STEERED, "swap_token": PARIS}, 400, "swap_token: name in steer_tokens"),
    ({"type": ["OTHER_LENS"]}, 422, "type.0"),
    ({"stream": "no"}, 422, "stream"),
]


@pytest.mark.parametrize(("changes", "status", "said"), REFUSED)
def test_what_cannot_be_read_is_refused_before_a_frame(
    http: httpx.Client, changes: dict[str, Any], status: int, said: str
) -> None:
    answer = http.post("/v1/lens/prompt", json={**ASKED, **changes})
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text


def test_a_model_without_jacobians_says_why(runtime: Runtime, serve: Serve) -> None:
    answer = no_jacobians(runtime, serve)
    expected = {"error": "Jacobian lens is not available for this model", "detail": "nobody has fitted any"}
    assert answer.status_code == 400
    assert answer.json().items() >= {**expected, "status": "unavailable", "code": "no_jacobian_lens"}.items()


def test_who_will_not_wait_is_told_so(runtime: Runtime, serve: Serve, http: httpx.Client) -> None:
    answer = busy(runtime, serve)
    assert answer.status_code == 429
    assert answer.json().items() >= {"error": "Server is busy with another request", "busy": True}.items()
    assert lines(http, fail_if_busy=True, layers=[1])[-1]["kind"] == "done"


def test_a_failure_is_the_last_frame_or_the_answer(runtime: Runtime, serve: Serve) -> None:
    failure = EngineFailed("The model's output is not finite")
    with serve(
        small_settings(), lambda: Wrapped(runtime, complete=FailingAfter(runtime, 0, failure))
    ).client() as client:
        frames = lines(client)
        answer = client.post("/v1/lens/prompt", json={**ASKED, "stream": False})
    assert [frame["kind"] for frame in frames] == ["meta", "prompt", "error"]
    for told in (frames[-1], answer.json()):
        assert told["kind"] == "error"
        assert told["error"] == "The model's output is not finite"
    assert answer.status_code == 500
