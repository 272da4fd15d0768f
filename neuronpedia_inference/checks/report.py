"""What was compared, how far it was apart, and what that says: a report that can be pasted."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from neuronpedia_inference import __version__
from neuronpedia_inference.engine.protocol import ModelInfo

PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens")


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    difference: float
    """The largest, in parts of what the numbers are made from. What is not finite never passes."""
    bound: float
    """What rounding may give."""
    where: str
    """At which place, text and position the difference is largest."""
    skipped: str = ""
    """Why nothing was compared; empty if something was."""

    @property
    def passed(self) -> bool:
        return bool(self.skipped) or (math.isfinite(self.difference) and self.difference <= self.bound)

    @property
    def verdict(self) -> str:
        return "skipped" if self.skipped else "ok" if self.passed else "WRONG"

    def line(self) -> str:
        """For people."""
        if self.skipped:
            return f"{self.name}: not compared: {self.skipped}"
        return f"{self.name}: {self.difference:.2g} apart at {self.where}, rounding gives at most {self.bound:.2g}"


@dataclass(frozen=True)
class Report:
    """All comparisons on one machine."""

    about: dict[str, str]
    """Versions, machine and model."""
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def summary(self) -> str:
        """One sentence. What was not compared is not called right."""
        n_skipped = sum(bool(check.skipped) for check in self.checks)
        if not self.passed:
            return "Some numbers are wrong."
        return f"All numbers that were compared are right.{f' Not compared: {n_skipped} checks.' if n_skipped else ''}"

    def to_json(self) -> dict[str, Any]:
        """`{"passed", "about", "checks": [{"name", "difference", "bound", "where", "skipped", "verdict"}]}`"""
        checks = [{**asdict(check), "verdict": check.verdict} for check in self.checks]
        for check in checks:
            if not math.isfinite(check["difference"]):
                check["difference"] = None  # JSON has no word for it
        return {"passed": self.passed, "about": self.about, "checks": checks}


def about(model: ModelInfo) -> dict[str, str]:
    """Everything that the numbers depend on."""
    return {
        "neuronpedia-inference": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "model": model.name,
        "architecture": model.family,
        "device": model.device,
        "dtype": model.dtype,
    }
