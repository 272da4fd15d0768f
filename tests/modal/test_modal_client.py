"""The README's example of the client against the deployed class, from another process: the same objects as here."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from neuronpedia_inference.client import Result
from tests.modal.service_under_test import ROOT, Deployed
from tests.rounding import differences

PROGRAM = """
import json, sys
import neuronpedia_inference as ni
from neuronpedia_inference.errors import InferenceError

assert "torch" not in sys.modules
space = {}
exec(sys.argv[1], space)
client = ni.modal()
found = {name: value.to_json() for name, value in space.items() if isinstance(value, ni.Result)}
events = list(client.stream("The most important thing is", space["economy"] @ 70, max_new_tokens=12))
try:
    client.features("a", "99-res-4k")
except InferenceError as exc:
    told = [type(exc).__name__, exc.code]
assert "torch" not in sys.modules
print("result:" + json.dumps({"found": found, "last": events[-1].to_json(), "told": told}))
"""


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "import neuronpedia_inference as ni" in block)


def ran(code: str, deployed: Deployed, program: str = PROGRAM) -> dict[str, dict[str, str]]:
    env = {**deployed.env(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("result:")[2])


HERE = """
import json, sys
import neuronpedia_inference as ni

space = {}
exec(sys.argv[1], space)
found = {name: value.to_json() for name, value in space.items() if isinstance(value, ni.Result)}
print("result:" + json.dumps({"found": found}))
"""


def test_the_readme_s_example_gives_the_same_objects_on_modal(deployed: Deployed) -> None:
    there = ran(example().replace("ni.load()", "ni.modal()"), deployed)
    here = ran(example(), deployed, HERE)
    assert there["found"].keys() == here["found"].keys()
    assert len(there["found"]) >= 4
    for name, text in there["found"].items():
        assert differences(json.loads(text), json.loads(here["found"][name])) == [], name
        assert Result.from_json(text).to_json() == text
    last = json.loads(str(there["last"]))["value"]
    assert last["steered"]["text"] == json.loads(there["found"]["both"])["value"]["steered"]["text"]
    assert there["told"] == ["UnknownSource", "unknown_source"]
