"""This machine's numbers, compared with plain Hugging Face and with arithmetic written out by hand."""

from neuronpedia_inference.checks.questions import self_test, verify
from neuronpedia_inference.checks.report import Check, Report

__all__ = ["Check", "Report", "self_test", "verify"]
