"""Stages of `scripts/train_embedded_saes.py`: text, collect, train, evaluate, label, steer-search, card."""
