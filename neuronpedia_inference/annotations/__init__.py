"""What is known of features beside their weights: labels, how often and how strongly they fire, and where.

It comes with the embedded SAEs, and from the files of LABELS_DIR for others.
"""

from neuronpedia_inference.annotations.files import read_folder
from neuronpedia_inference.annotations.search import Found, Searcher
from neuronpedia_inference.annotations.values import Context, SourceAnnotations

__all__ = ["Context", "Found", "Searcher", "SourceAnnotations", "read_folder"]
