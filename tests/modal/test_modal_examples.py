"""The examples and the notebook, run against a deployed service by a Python that does not see this project."""

from __future__ import annotations

import json

from tests.modal.service_under_test import ROOT, Deployed

EXAMPLES = ROOT / "examples"


def test_the_client_example(deployed: Deployed) -> None:
    code = (EXAMPLES / "modal_client.py").read_text(encoding="utf-8").partition("from __future__")[2].partition("\n")[2]
    said = deployed.python(
        """
        import contextlib, io, types
        shown, module = io.StringIO(), types.ModuleType("example")
        exec(sys.argv[1], module.__dict__)
        with contextlib.redirect_stdout(shown):
            module.main("15-res-4k")
        result = shown.getvalue().splitlines()
        """,
        code.replace("str | None", "object"),
    )
    assert said[0].startswith("smollm2-135m-instruct on cpu, sources: 10-res-4k, 15-res-4k, 20-res-4k")
    assert any(line.startswith("15-res-4k #") and "on " in line for line in said)
    plain, steered = (next(line for line in said if line.startswith(name)) for name in ("plain:", "steered:"))
    assert plain.split(":")[1].strip() != steered.split(":")[1].strip()
    so_far = [line.removeprefix("so far: ").strip() for line in said if line.startswith("so far:")]
    assert len(so_far) >= 2
    assert so_far[-1] == steered.removeprefix("steered:").strip()
    assert sum("→" in line for line in said) == 3


def test_the_notebook(deployed: Deployed) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    names = deployed.python(
        """
        import contextlib, io
        space, shown = {}, io.StringIO()
        with contextlib.redirect_stdout(shown):
            for cell in json.loads(sys.argv[1]):
                exec(cell, space)
        result = {
            "source": space["source"],
            "features": len(space["answer"]["features"]),
            "texts": [space["both"][key]["text"] for key in ("default", "steered")],
            "streamed": space["event"]["steered"]["text"],
            "answers": len(space["answers"]),
        }
        """,
        json.dumps(cells),
    )
    assert (names["source"], names["features"], names["answers"]) == ("15-res-4k", 5, 3)
    assert names["texts"][0] != names["texts"][1]
    assert names["texts"][1].startswith(names["streamed"])
