"""Interpretability inference: SAE features, top-k and steering for language models.

Importing this package does nothing. `Runtime.load` (in `neuronpedia_inference.runtime`) loads a model.
"""

__version__ = "0.1.0"
