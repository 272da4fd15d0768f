"""What a test finds in its process, whatever ran there before: what one that has just begun has."""

from __future__ import annotations

import gc
import logging
import os
import sys

from neuronpedia_inference.observability import PACKAGE
from neuronpedia_inference.settings import Settings, variable

ROOT_LEVEL = logging.getLogger().level
N_THREADS = 1
SEED = 0


def forget_settings() -> None:
    """No setting of the machine reaches the tests."""
    for field in Settings.model_fields:
        os.environ.pop(variable(field), None)


def freshen() -> None:
    """Undo what commands and loaded models do to their process, and begin torch's random numbers again."""
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if handler.get_name() != PACKAGE]
    root.setLevel(ROOT_LEVEL)
    logging.getLogger(PACKAGE).setLevel(logging.NOTSET)
    gc.unfreeze()
    gc.enable()
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(N_THREADS)
        torch.manual_seed(SEED)
