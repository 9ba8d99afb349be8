"""Ovis2 and SigLIP in plain torch: layers, weights, tensor parallelism. Knows tensors, not requests."""
