"""Use the engine alone: no Ray, no files, one process.

    python examples/engine.py IMAGE [IMAGE ...]

The model is the demo model of this repository; put a hub id or a directory in its place.
"""

from __future__ import annotations

import sys

from PIL import Image

from ovis_model import OvisEngine, Processor, SamplingParams

MODEL = "demo"


def ask(paths: list[str]) -> None:
    """Print a caption of each image, and the probability of each answer to a question."""
    processor = Processor.from_pretrained(MODEL)  # tokenizer and tiling: loads neither torch nor weights
    with OvisEngine.from_pretrained(MODEL, device="auto") as engine:  # CUDA if there is a GPU
        images = [Image.open(path) for path in paths]
        captions = [processor.build_request("Describe the image.", [image]) for image in images]
        questions = [processor.build_request("What colour is the background?", [image]) for image in images]

        # One call for all requests: the engine batches them, and a finished one makes room for the next.
        described = engine.generate(captions, SamplingParams(max_new_tokens=64))
        # Allowed answers are scored in one pass instead of generated.
        colours = ["white", "grey", "black"]
        choices = tuple(tuple(processor.encode_answer(colour)) for colour in colours)
        scored = engine.generate(questions, SamplingParams(choices=choices))

    for path, caption, answer in zip(paths, described, scored, strict=True):
        assert answer.choice_probs is not None
        probabilities = ", ".join(f"{c} {p:.0%}" for c, p in zip(colours, answer.choice_probs, strict=True))
        print(f"{path}\t{processor.detokenize(caption.output_ids)}\t{probabilities}")


if __name__ == "__main__":
    ask(sys.argv[1:])
