"""The stages of `fit_jacobians.py`."""
