"""The language model: where its tensors are (points), reading and writing them (hooks), running it (bridge)."""
