"""A vector of your own: the mean difference of two sets of texts, captured, sent back and steered with.

    python examples/mean_difference.py [http://127.0.0.1:5002]

Without an address the embedded model runs in this process. A server's secret comes from the environment: SECRET=...
"""

import os
import sys

import neuronpedia_inference as ni

SPACE = ["The moon and the stars are bright.", "A planet moves around the sun.", "The rocket left for the station."]
KITCHEN = ["Bake the bread until it is brown.", "Stir salt into the soup.", "Chop the onions and fry them in butter."]

with ni.connect(sys.argv[1], os.environ.get("SECRET")) if sys.argv[1:] else ni.load() as m:
    space = m.mean_difference(SPACE, KITCHEN, "blocks.15.hook_resid_post")
    for strength in (-1, 0, 1, 2):
        text = m.steer("My friend told me about", space @ strength, max_new_tokens=16, compare=False).steered.text
        print(f"{strength:+d}", " ".join(text.split()))
