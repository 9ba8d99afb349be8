"""Batched generation over one replica: scheduling, cache, sampling, ranks. Knows token ids, not text or images."""
