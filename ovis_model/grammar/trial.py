"""Walk through a grammar with plausible text, to find those that no row can finish before a run starts.

A grammar exhausts its limits only while it is used, e.g. a pattern of words with a large `maxLength` at its first
letters. Knows bytes only: the grammar must be compiled for a vocabulary of bytes.
"""

from __future__ import annotations

import time
from itertools import cycle

import llguidance
import numpy as np

END = 256
_MAX_BYTES = 1_200
_MAX_S = 0.25  # CPU time per walk: a grammar that takes longer is usable
_TEXT = b"a photo of the blue dog in a garden "
_WORDS = b"eatoinshrdlucmfwypvbgkqjxz 0123456789ETAOINSHRDLUCMFWYPVBGKQJXZ.,:-"
_CLOSING = b'"}],:'
# Both orders reach optional parts: the first prefers long text, the second ends each text after a few letters.
_WALKS = ((_WORDS + _CLOSING, _MAX_BYTES), (_CLOSING + _WORDS, 4))


def find_dead_end(grammar: llguidance.LLMatcher) -> llguidance.LLMatcher | None:
    """Return the state of a walk that cannot be continued; None if all walks end or reach their limit."""
    for order, max_text_bytes in _WALKS:
        state = grammar.deep_copy()
        _walk(state, order, max_text_bytes)
        if state.is_error():
            return state
    return None


def _walk(state: llguidance.LLMatcher, order: bytes, max_text_bytes: int) -> None:
    """Advance the state by text where it is allowed, else by the first byte of `order` that is."""
    text, num_text = cycle(_TEXT), 0
    wanted = next(text)
    stop_s = time.process_time() + _MAX_S
    for _ in range(_MAX_BYTES):
        allowed = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
        if state.is_error() or time.process_time() > stop_s:
            return
        if allowed[wanted] and num_text < max_text_bytes:
            byte, wanted, num_text = wanted, next(text), num_text + 1
        else:
            byte, num_text = _choose(allowed, order), 0
        if byte == END or not state.consume_token(byte):
            return


def _choose(allowed: np.ndarray, order: bytes) -> int:
    """Return the first byte of `order` that is allowed, else the lowest one; the end only if nothing else is."""
    return next((byte for byte in order if allowed[byte]), int(np.argmax(allowed)))
