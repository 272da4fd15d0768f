"""Sparse autoencoders: what exists, how one is loaded, where it is resident, and what is read from it."""
