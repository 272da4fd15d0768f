"""Parts 11 to 13: messages that say what to do, the suite, and `verify`."""

from __future__ import annotations

import json
import re
import socket
import subprocess

from benchmarks.fire_tree import SOURCE, Tree, patience, short, tail, told

SERVE = ("serve", "--port", "0")
NO_SAES = ("--sae-sets", "[]")
NOBODY_THERE = "http://127.0.0.1:9"
HUB_S = 15.0
"""That a start may take longer where the hub cannot be reached than where it may not be asked: it was 44 s."""
LIMIT_S = 300
"""What a test may take for granted of a loaded laptop: less is a time limit."""


def a_folder_that_is_nearly_there(tree: Tree) -> str:
    """`./my-modle` is answered with the near folder."""
    here = tree.new_folder()
    (here / "my-model").mkdir()
    said = tree.run(*SERVE, "--model-id", "./my-modle", *NO_SAES, folder=here)
    return said.one_line("MODEL_ID", "my-modle", "my-model'")


def a_device_that_is_none(tree: Tree) -> str:
    """`--device gpu` is answered with the words that there are."""
    ended = tree.run(*SERVE, "--device", "gpu", *NO_SAES)
    said = ended.one_line("DEVICE", "gpu", "auto", "cpu", "mps", "cuda")
    assert "pattern" not in said, said
    return said


def a_server_without_saes_says_so(tree: Tree) -> str:
    """No SAEs configured: the answer says which settings give some."""
    with tree.serving(*tree.small_words) as served:
        said = served.refused("/v1/activations", {"prompt": "a", "source": "7-res"}, "SAE_SETS", statuses=(400, 404))
        served.refused("/v1/activations", {"prompt": "a"}, "SAE_SETS", statuses=(400, 404))
    return said


def an_sae_folder_as_its_own_parent(tree: Tree) -> str:
    """An SAE folder given as its own parent is served."""
    folder = tree.root / "neuronpedia_inference" / "embedded" / "saes" / SOURCE
    with tree.loading(env={"LOCAL_SAE_DIR": str(folder)}) as served:
        served.ready()
        (result,) = served.asked("/v1/top-k", {"prompt": "The cat", "source": SOURCE})["results"]
        sources = [one["name"] if isinstance(one, dict) else one for one in _capabilities(served.url)["sources"]]
    assert sources == [SOURCE], sources
    return f"{folder.name} is served: {len(result['positions'])} positions"


def _capabilities(url: str) -> dict[str, list[object]]:
    import httpx

    return httpx.get(f"{url}/v1/capabilities", timeout=60).json()


def a_hub_that_cannot_be_reached(tree: Tree) -> str:
    """A hub that cannot be reached: one line and what to set, without retries twice over."""
    env = {"HF_ENDPOINT": NOBODY_THERE, "HF_HOME": str(tree.new_folder())}
    words = (*SERVE, "--model-id", "nobody/here", *NO_SAES)
    offline = tree.run(*words, env={**env, "HF_HUB_OFFLINE": "1"})
    ended = tree.run(*words, env={**env, "HF_HUB_OFFLINE": "0"})
    longer_s = ended.seconds - offline.seconds
    shown = f"{longer_s:.0f} s longer than offline"
    assert longer_s <= HUB_S * patience(), f"{shown}: {tail(ended.err)}"
    return f"{ended.one_line('MODEL_ID', NOBODY_THERE, 'HF_ENDPOINT')} ({shown})"


def a_card_that_is_not_there(tree: Tree) -> str:
    """`DEVICE=cuda:7` on a machine with one card is one line that says which there are."""
    words = (*SERVE, *tree.small_words)
    return tree.run(*words, fault="cards", env={"DEVICE": "cuda:7"}).one_line("cuda:7", "cuda:0")


def a_port_in_use(tree: Tree) -> str:
    """A port in use is told before loading begins. (232fc0c does so too: it is to stay.)"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = tree.run("serve", "--port", port, *tree.small_words)
    assert "Loading" not in ended.out, short(ended.out)
    return ended.one_line(port, "in use")


def the_root_is_a_page(tree: Tree) -> str:
    """`GET /` says where one is."""
    answer = tree.open.http.get("/", headers={"Accept": "text/html"})
    assert answer.status_code == 200, told(answer)
    title = re.search("<title>(.*)</title>", answer.text)
    assert title, short(answer.text)
    return f"200 {title.group(1)}"


def a_path_that_is_none_names_the_near_one(tree: Tree) -> str:
    """`/v1` and `/v1/top_k` name the near path."""
    for method, path, near in (("GET", "/v1", "/v1/capabilities"), ("POST", "/v1/top_k", "/v1/top-k")):
        answer = tree.open.http.request(method, path)
        assert answer.status_code == 404, told(answer)
        assert near in answer.json()["error"], told(answer)
    return told(answer)


def a_wrong_method_names_the_right_one(tree: Tree) -> str:
    """Wrong methods name the right one."""
    for method, path, right in (("GET", "/v1/steer", "POST"), ("POST", "/v1/capabilities", "GET")):
        answer = tree.open.http.request(method, path)
        assert answer.status_code == 405, told(answer)
        assert right in answer.json()["error"].replace(method, ""), told(answer)
    return told(answer)


# The suite


def long_tests_are_apart(tree: Tree) -> str:
    """Long tables, fuzzing and kits are `make test-long`, CI runs both, and there is a quick subset."""
    for target in ("test", "test-long", "test-quick"):
        made = subprocess.run(["make", "-n", target], cwd=tree.root, capture_output=True, text=True, check=False)
        assert made.returncode == 0, f"make {target}: {tail(made.stderr)}"
    lines = (tree.root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make test", "make test-long"} <= set(lines), f".ci/run ends in {lines[-1]!r}"
    return "make test, test-long and test-quick; .ci/run runs the first two"


def tests_have_no_time_limits(tree: Tree) -> str:
    """No time limit that a loaded laptop misses, as `test_modal_lifecycle.py` had of its containers' first answers."""
    file = tree.root / "tests" / "modal" / "test_modal_lifecycle.py"
    limits = [int(found) for found in re.findall(r"timeout=(\d+)", file.read_text(encoding="utf-8"))]
    assert limits, "nothing is waited for"
    assert min(limits) >= LIMIT_S, f"{sum(one < LIMIT_S for one in limits)} limits of {min(limits)} s"
    return f"{len(limits)} limits, the shortest {min(limits)} s"


# verify


def numbers_can_be_verified(tree: Tree) -> str:
    """`neuronpedia-inference verify` compares this machine's numbers with plain Hugging Face, and prints a report."""
    ended = tree.run("verify", *tree.small_words, "--json")
    assert ended.code == 0, f"exit code {ended.code}: {tail(ended.err)}"
    checks = json.loads(ended.out)["checks"]
    kinds = " ".join(check["name"] for check in checks)
    assert checks, "nothing is compared"
    return short(f"{len(checks)} checks: {kinds}")


PROBES = {
    11: (
        a_folder_that_is_nearly_there,
        a_device_that_is_none,
        a_server_without_saes_says_so,
        an_sae_folder_as_its_own_parent,
        a_hub_that_cannot_be_reached,
        a_card_that_is_not_there,
        a_port_in_use,
        the_root_is_a_page,
        a_path_that_is_none_names_the_near_one,
        a_wrong_method_names_the_right_one,
    ),
    12: (long_tests_are_apart, tests_have_no_time_limits),
    13: (numbers_can_be_verified,),
}
