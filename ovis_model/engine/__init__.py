"""Batched generation with one replica: scheduling, cache, sampling, ranks. Knows token ids, not text or images."""
