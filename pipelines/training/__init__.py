"""Train a model: rows of dialogue, workers that share the gradient, checkpoints, and a page about the run."""
