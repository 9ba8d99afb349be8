"""Compile constraints to grammars and compute masks over the next tokens.

llguidance parses and masks. An answer that ends is always valid. Knows token ids and bytes: no torch, no prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property, lru_cache
from threading import Lock
from typing import TYPE_CHECKING

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ovis_model.grammar.json_schema import adapt_schema, parse_schema
from ovis_model.grammar.regex import check_pattern, shorten
from ovis_model.types import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_CACHED_GRAMMARS = 64
_MASK_THREADS = 4
_LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_JSON_STYLE: JsonCompileOptions = {
    # A space after commas and colons or none, no line breaks: white space must not fill an answer.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # No \uXXXX: it is for control characters only, which regular expressions disagree about.
    "json_allowed_escapes": '"\\nrtbf',
}
_TEXT = r"/[^\x00-\x08\x0B\x0C\x0E-\x1F\x7F]*/"


def check(constraint: Constraint, tokenizer: Tokenizer | None = None) -> None:
    """Raise ValueError if the constraint is not supported or no answer satisfies it.

    With a tokenizer, also check that its tokens can spell the beginning of an answer.
    """
    matcher = _start_matcher(
        constraint, _make_byte_trie() if tokenizer is None else _make_token_trie(tokenizer, None, None)
    )
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(f"no answer satisfies the {constraint.kind} {shorten(constraint.spec)}")


class Guide:
    """The state of one answer. `error` says why it cannot be continued, if so."""

    def __init__(self, grammar: Future[llguidance.LLMatcher]) -> None:
        self._grammar = grammar
        self._matcher: llguidance.LLMatcher | None = None
        self._num_taken = 0
        self.error = ""

    def advance_to(self, output_ids: Sequence[int]) -> llguidance.LLMatcher:
        """Wait for the grammar and return its state after these tokens. Fewer tokens than last time start it again."""
        if self._matcher is None or len(output_ids) < self._num_taken:
            self._matcher, self._num_taken = self._grammar.result().deep_copy(), 0
        self._matcher.consume_tokens(list(output_ids[self._num_taken :]))
        self._num_taken = len(output_ids)
        return self._matcher


class Guides:
    """Guides and masks for one model, computed in threads that hold no interpreter lock."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size` is the number of logits; those beyond the tokenizer's ids are always masked."""
        self.vocab_size = vocab_size
        self._tokenizer, self._eos_token_ids = tokenizer, list(eos_token_ids)
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self._masking = ThreadPoolExecutor(1, "masks")
        self._grammar = lru_cache(_CACHED_GRAMMARS)(
            lambda constraint: self._compiling.submit(self._compile, constraint)
        )
        self._lock = Lock()

    def make_guide(self, constraint: Constraint) -> Guide:
        """Return the guide of a new answer. A grammar is compiled once, in the background."""
        with self._lock:
            return Guide(self._grammar(constraint))

    def compute_masks(self, answers: Sequence[tuple[Guide, Sequence[int]]]) -> Future[NDArray[np.uint8]]:
        """Compute masks from guides and each answer's token ids: uint8[answers, bytes], a bit per id, lowest first.

        A guide with an `error` allows all tokens.
        """
        return self._masking.submit(self._masks, answers)

    @cached_property
    def _trie(self) -> llguidance.LLTokenizer:
        return _make_token_trie(self._tokenizer, self.vocab_size, self._eos_token_ids)

    @cached_property
    def _cores(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(_MASK_THREADS)

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        return _start_matcher(constraint, self._trie)

    def _masks(self, answers: Sequence[tuple[Guide, Sequence[int]]]) -> NDArray[np.uint8]:
        masks = allocate_token_bitmask(len(answers), self.vocab_size)
        states = [_state(guide, output_ids) for guide, output_ids in answers]
        sound = [(state, place) for place, state in enumerate(states) if state is not None]
        if sound:
            fill_next_token_bitmask_par(self._cores, sound, masks)
        for state, place in sound:
            if state.is_error():
                answers[place][0].error = f"the answer cannot be continued within its constraint: {state.stop_reason()}"
                masks[place] = -1
        return masks.view(np.uint8)


def _state(guide: Guide, output_ids: Sequence[int]) -> llguidance.LLMatcher | None:
    try:
        state = guide.advance_to(output_ids)
    except ValueError as error:  # of compilation
        guide.error = str(error)
        return None
    return state


def _start_matcher(constraint: Constraint, trie: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """Return the state at the start of an answer. Raise ValueError with what the library refuses."""
    matcher = llguidance.LLMatcher(trie, _grammar(constraint), log_level=0, limits=_LIMITS)
    if matcher.is_error():
        reason = matcher.get_error().strip().splitlines()[0]
        if "coerce_one_of" in reason:  # an option that would make it wrong
            reason = "'oneOf' is supported if no value can match two of its parts; add a tag, or use 'anyOf'"
        raise ValueError(f"{constraint.kind} {shorten(constraint.spec)}: {reason}")
    return matcher


def _grammar(constraint: Constraint) -> str:
    if constraint.kind == "json_schema":
        schema = json.dumps(adapt_schema(parse_schema(constraint.spec)), ensure_ascii=False)
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE)
    check_pattern(constraint.spec)
    pattern = llguidance.LLMatcher.grammar_from_regex(llguidance.regex_to_lark(constraint.spec, "dw"))
    start = json.loads(pattern)["grammars"][0]["lark_grammar"]
    return llguidance.LLMatcher.grammar_from_lark(f"{start.replace('start:', 'ANSWER:', 1)} & {_TEXT}\nstart: ANSWER")


def _make_token_trie(
    tokenizer: Tokenizer, vocab_size: int | None, eos_token_ids: list[int] | None
) -> llguidance.LLTokenizer:
    """Read the vocabulary. Added tokens of the form <...> are special to the library and always masked."""
    return llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=eos_token_ids)


@cache
def _make_byte_trie() -> llguidance.LLTokenizer:
    """Return a vocabulary of bytes, for checks without a checkpoint."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


class _Bytes:
    """The tokenizer interface of the library."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"<end of text>")
    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
