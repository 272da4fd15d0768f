"""The first five minutes of somebody new, with a stopwatch: from a fresh clone to a vector of their own.

`python scripts/first_five_minutes.py` clones this repository into a folder that is thrown away and does what the README
says, with nothing kept from earlier but what pip has downloaded. It prints a row for each step: what was done, what was
seen, seconds. `--write` puts the table into docs/experiments.md. It needs Chromium (docs/page.md).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.http.browser import Visit, browser, visiting  # noqa: E402  (of this tree, wherever it is started)

EXPERIMENTS = ROOT / "docs" / "experiments.md"
START, END = "<!-- first-minutes:start -->", "<!-- first-minutes:end -->"
PATIENCE_S = 1200
OWN_TEXT = "The nurse gave the patient medicine."
OWN_PROMPT = "Yesterday I"
NOTEBOOK = """
import run_notebooks
done = run_notebooks.run(run_notebooks.read("laptop.ipynb"), {})
shown = [output.get("data", {}) for cell in done["cells"] for output in cell.get("outputs", [])]
print(sum("text/html" in data for data in shown), "results drawn")
"""
OWN_VECTOR = """
import sys
import neuronpedia_inference as ni
armies = ["The army crossed the river at night.", "Soldiers held the hill until the morning.",
          "The troops attacked the old fort.", "A general led his men into battle.", "The war began in the spring."]
others = ["The boys crossed the street at night.", "Bakers worked in the kitchen until the morning.",
          "The guests visited the old church.", "A teacher led her class into the garden.",
          "The rain began in the spring."]
with ni.connect(sys.argv[1]) as m:
    own = m.mean_difference(armies, others, "blocks.15.hook_resid_post")
    both = m.steer(sys.argv[2], own @ 3, max_new_tokens=16)
    assert both.steered.text != both.default.text
    print(f"“{sys.argv[2]}{both.steered.text}”")
"""


@dataclass
class Stopwatch:
    """Steps with their seconds, printed as they end."""

    began: float = field(default_factory=time.monotonic)
    rows: list[tuple[str, str, float]] = field(default_factory=list)

    def step(self, done: str, work: Callable[[], str]) -> None:
        """work: gives what was seen."""
        began = time.monotonic()
        seen = work()
        self.rows.append((done, seen, time.monotonic() - began))
        print(f"{self.rows[-1][2]:7.1f} s  {done}: {seen}", flush=True)

    def table(self) -> str:
        lines = ["| step | what was seen | seconds |", "| --- | --- | ---: |"]
        lines += [f"| {done} | {seen.replace('|', '/')} | {seconds:.1f} |" for done, seen, seconds in self.rows]
        return "\n".join([*lines, f"| all | | {sum(row[2] for row in self.rows):.1f} |"])


class Clone:
    """A fresh clone and how its commands are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "neuronpedia-inference"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        dropped = ("VIRTUAL_ENV", "PYTHONPATH", "CI")
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment |= {"NEURONPEDIA_INFERENCE_CACHE": str(folder / "cache"), "SERVER_PORT": str(port)}

    def clone(self) -> str:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.folder)], check=True, timeout=PATIENCE_S)
        told = ["git", "-C", str(self.folder), "log", "-1", "--format=%h"]
        return f"commit {subprocess.run(told, check=True, capture_output=True, text=True).stdout.strip()}"

    def run(self, *command: str) -> str:
        heard = {"capture_output": True, "text": True, "timeout": PATIENCE_S}
        done = subprocess.run(command, cwd=self.folder, env=self.environment, check=False, **heard)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def python(self, code: str, *arguments: str) -> str:
        """With the Python that `make` has set up."""
        begin = "import sys; sys.path.insert(0, 'scripts')\n"
        return self.run(".venv/bin/python", "-c", begin + code, *arguments).strip()

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(
            ["make", "serve"], cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)

    def wait_until_ready(self, process: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                    return f"/ready answers {answer.status}"
            except OSError:
                time.sleep(0.1)
        raise SystemExit("the server does not become ready")


def demo(clone: Clone) -> str:
    said = clone.run("make", "demo")
    assert "steered" in said, said[-2000:]
    return "features and a steered text"


def example(visit: Visit) -> str:
    page = visit.open()
    visit.rested()
    return f"an example is answered: {page.locator('.card h3').first.inner_text()}"


def own_text(visit: Visit) -> str:
    visit.page.get_by_label("Text", exact=True).fill(OWN_TEXT)
    visit.page.get_by_role("button", name="Read").click()
    visit.until("[...document.querySelectorAll('.strip .token')].some(one => one.textContent.includes('nurse'))")
    visit.rested()
    return f"first of “{OWN_TEXT}”: {visit.page.locator('.features .feature-name').first.inner_text()}"


def own_steering(visit: Visit) -> str:
    page = visit.page
    page.get_by_label("Find features by words").fill("military army war")
    page.get_by_label("Find features by words").press("Enter")
    first = page.locator(".finder button.feature").first
    label = first.locator(".feature-name").inner_text()
    first.click()
    page.get_by_role("heading", name=label).wait_for()
    page.get_by_role("button", name="Steer with it").click()
    page.get_by_label("Prompt", exact=True).fill(OWN_PROMPT)
    page.get_by_role("button", name="Write").click()
    visit.until("document.querySelector('.output.steered')?.getAttribute('aria-busy') === 'false'")
    written = "".join(page.locator(".output.steered .token:not(.prompt)").all_inner_texts())
    return f"{label}: “{OWN_PROMPT}{written}”"


def minutes(clone: Clone, watch: Stopwatch) -> None:
    """All steps, in order."""
    watch.step("`git clone`", clone.clone)
    watch.step("`make demo`", lambda: demo(clone))
    watch.step("the notebook, top to bottom", lambda: clone.python(NOTEBOOK))
    with clone.serving() as process:
        watch.step("`make serve`", lambda: clone.wait_until_ready(process))
        with browser() as opened, visiting(opened, clone.url) as visit:
            watch.step("the page", lambda: example(visit))
            watch.step("a text of one's own", lambda: own_text(visit))
            watch.step("a steering of one's own", lambda: own_steering(visit))
        watch.step("a vector of one's own", lambda: clone.python(OWN_VECTOR, clone.url, OWN_PROMPT))


def written(table: str, load: float) -> str:
    """The document with the table in its place."""
    about = (
        f"{os.cpu_count()} cores ({platform.system()} {platform.machine()}), load {load:.1f} when it began, "
        f"Python {platform.python_version()}; pip may take packages from its cache.\n\n"
    )
    text = EXPERIMENTS.read_text(encoding="utf-8")
    return re.sub(f"{START}.*{END}", lambda _: f"{START}\n{about}{table}\n{END}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/experiments.md")
    is_written, load = parser.parse_args().write, os.getloadavg()[0]
    watch = Stopwatch()
    with tempfile.TemporaryDirectory(prefix="first-five-minutes-") as folder:
        minutes(Clone(Path(folder)), watch)
    print(watch.table())
    if is_written:
        EXPERIMENTS.write_text(written(watch.table(), load), encoding="utf-8")


if __name__ == "__main__":
    main()
