"""When an answer ends. Knows ids and, for stop strings, their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from ovis_model.engine.request_state import RequestState
from ovis_model.tokenizer import cut_at_stop, detokenize
from ovis_model.types import FinishReason


@dataclass(frozen=True)
class StopRule:
    """Ends an answer at an end-of-text id, at a stop string or at its maximum length."""

    eos_token_ids: Sequence[int]
    tokenizer: Tokenizer | None

    def finish_reason(self, state: RequestState) -> FinishReason | None:
        """Return why the newest token is the last one, or None if it is not."""
        if state.output_ids[-1] in self.eos_token_ids or self._ends_in_stop_string(state):
            return "stop"
        return "length" if len(state.output_ids) == state.params.max_new_tokens else None

    def _ends_in_stop_string(self, state: RequestState) -> bool:
        stops = state.params.stop
        if not stops or self.tokenizer is None:
            return False
        # A character takes up to four byte tokens: only the tail can newly hold a stop string.
        text = detokenize(self.tokenizer, state.output_ids[-4 * (max(map(len, stops)) + 1) :])
        return cut_at_stop(text, stops) != text
