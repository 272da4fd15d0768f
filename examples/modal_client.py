"""The first five minutes with a deployed service. Needs nothing but `pip install modal` and a Modal token.

python examples/modal_client.py [SOURCE]
"""

from __future__ import annotations

import sys

import modal

PROMPT = "The army crossed the river."


def main(source: str | None) -> None:
    service = modal.Cls.from_name("neuronpedia-inference", "Inference")()

    about = service.capabilities.remote()
    source = source or about["sources"][0]
    print(f"{about['model']} on {about['device']}, sources: {', '.join(about['sources'])}")

    strongest = service.activations.remote(PROMPT, source=source, num_results=3)["results"][0]
    for feature in strongest["features"]:
        token = strongest["tokens"][feature["max_value_index"]]
        name = f"{feature['source']} #{feature['index']} {feature['label'] or ''}"
        print(f"{name}: {feature['max_value']:.1f} on {token!r}")

    for position in service.top_k.remote(PROMPT, source=source, top_k=1)["results"][0]["positions"]:
        for best in position["top_features"]:  # none at the BOS token, which is left out
            print(f"{position['token']!r:12} #{best['feature_index']} {best['activation_value']:.1f}")

    steering = {"features": [{"source": source, "index": strongest["features"][0]["index"], "strength": 40}]}
    both = service.steer.remote("I think that", max_new_tokens=8, **steering)
    print("plain:  ", both["default"]["text"])
    print("steered:", both["steered"]["text"])

    for event in service.steer_stream.remote_gen("I think that", max_new_tokens=8, **steering):
        print("so far: ", event["steered"]["text"])

    prompts = ["A cat sat.", "A court heard it.", "Sugar and salt."]
    answers = service.activations.map(prompts, kwargs={"source": source, "num_results": 1})
    for prompt, answer in zip(prompts, answers, strict=True):
        print(prompt, "→", answer["results"][0]["features"][0]["index"])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
