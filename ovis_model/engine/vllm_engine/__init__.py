"""A second engine: vLLM generates with the language model, from the embeddings that this project computes.

Tiles, vision tower, embedding table and placeholders are those of the first engine, so what vLLM's own Ovis2 does
otherwise (the order of the indicators, a single thread that prepares images) has no part in it.
"""
