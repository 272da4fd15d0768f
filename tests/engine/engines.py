"""The engine under test over the small models, built once each."""

from __future__ import annotations

from functools import cache

import torch

from neuronpedia_inference.engine.engine import ModelEngine
from tests import models


@cache
def engine(family: str, stop_ids: tuple[int, ...] = ()) -> ModelEngine:
    with torch.inference_mode(False):
        return ModelEngine(models.model(family), model_id=family, name=family, stop_ids=stop_ids)
