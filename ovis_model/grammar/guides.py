"""Compile constraints to grammars and compute masks over the next tokens.

llguidance parses and masks. An answer that ends is always valid. Knows token ids and bytes: no torch, no prompts.

All answers to a constraint share the states of its lexer, which makes masks cheap, but a limit that one answer exhausts
would fail all of them. So an answer that cannot be continued is tried once more with a grammar of its own, and new
answers get a fresh one.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ovis_model.grammar import keywords
from ovis_model.grammar.json_schema import adapt_schema, parse_schema, walk_schemas
from ovis_model.grammar.regex import check_pattern, shorten
from ovis_model.grammar.trial import find_dead_end
from ovis_model.types import Constraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_CACHED_GRAMMARS = 64
_MASK_THREADS = 4
_MAX_LEXER_STATES = 50_000
_MAX_STEP_FUEL = 5_000_000  # what a text of 99 words and 5,000 characters needs, once: about 0.1 s
_LIMITS = llguidance.LLParserLimits(
    max_lexer_states=_MAX_LEXER_STATES,
    initial_lexer_fuel=_MAX_STEP_FUEL,
    step_lexer_fuel=_MAX_STEP_FUEL,
    verbose_errors=False,
)
_MAX_TRIALS = 30
_TEXT_KEYWORDS = ("type", "pattern", "minLength", "maxLength")
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
    """Raise ValueError if the constraint is not supported, or if texts exhaust its grammar.

    With a tokenizer, also check that its tokens can spell the beginning of an answer.
    """
    trie = _make_byte_trie() if tokenizer is None else _make_token_trie(tokenizer, None, None)
    matcher = _start_matcher(constraint, trie)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(f"no answer satisfies the {constraint.kind} {shorten(constraint.spec)}")
    for part in _list_trials(constraint):
        if stuck := find_dead_end(_start_matcher(part, _make_byte_trie())):
            raise ValueError(f"{part.kind} {shorten(part.spec)}: answers exceed its limits: {_describe_stop(stuck)}")


def allows(constraint: Constraint, text: str) -> bool:
    """Return whether a text is a whole answer. Raise ValueError if the constraint is not supported."""
    state = _start_matcher(constraint, _make_byte_trie())
    return bool(state.try_consume_tokens(list(text.encode())) == len(text.encode()) and state.is_accepting())


def can_compile(schema: str) -> bool:
    """Return whether the library itself compiles a JSON schema as it is written, right or wrong."""
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE)
    return not llguidance.LLMatcher(_make_byte_trie(), grammar, log_level=0, limits=_LIMITS).is_error()


def _list_trials(constraint: Constraint) -> Iterator[Constraint]:
    """Yield the constraint, and each text in its schema: a walk through the whole may miss some of them."""
    yield constraint
    if constraint.kind == "json_schema":
        parts = {json.dumps(part): None for part in walk_schemas(parse_schema(constraint.spec)) if _is_costly(part)}
        for text in list(parts)[:_MAX_TRIALS]:
            yield Constraint("json_schema", text)


def _is_costly(part: dict[str, Any]) -> bool:
    return part.keys() >= {"pattern", "maxLength"} and part.keys() <= {*_TEXT_KEYWORDS, *keywords.IGNORED}


class Guide:
    """The state of one answer. `error` says why it cannot be continued, if so."""

    def __init__(self, constraint: Constraint, grammar: Future[llguidance.LLMatcher]) -> None:
        self.constraint, self.grammar = constraint, grammar
        self._matcher: llguidance.LLMatcher | None = None
        self._num_taken = 0
        self.error = ""

    def advance_to(self, output_ids: Sequence[int]) -> llguidance.LLMatcher:
        """Wait for the grammar and return its state after these tokens. Fewer tokens than last time start it again."""
        if self._matcher is None or len(output_ids) < self._num_taken:
            self._matcher, self._num_taken = self.grammar.result().deep_copy(), 0
        self._matcher.consume_tokens(list(output_ids[self._num_taken :]))
        self._num_taken = len(output_ids)
        return self._matcher

    def restart(self, grammar: llguidance.LLMatcher, output_ids: Sequence[int]) -> llguidance.LLMatcher:
        """Continue with a grammar that no other answer uses; return its state after these tokens."""
        self._matcher, self._num_taken = grammar, 0
        return self.advance_to(output_ids)


class Guides:
    """Guides and masks for one model, computed in threads that hold no interpreter lock."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size` is the number of logits; those beyond the tokenizer's ids are always masked."""
        self.vocab_size = vocab_size
        self._tokenizer, self._eos_token_ids = tokenizer, list(eos_token_ids)
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self._masking = ThreadPoolExecutor(1, "masks")
        self._grammars: OrderedDict[Constraint, Future[llguidance.LLMatcher]] = OrderedDict()
        self._lock = Lock()

    def make_guide(self, constraint: Constraint) -> Guide:
        """Return the guide of a new answer. A grammar is compiled once, in the background."""
        with self._lock:
            grammar = self._grammars.pop(constraint, None) or self._compiling.submit(self._compile, constraint)
            self._grammars[constraint] = grammar  # the most recently used one is the last
            if len(self._grammars) > _CACHED_GRAMMARS:
                self._grammars.popitem(last=False)
            return Guide(constraint, grammar)

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
        for place in [place for state, place in sound if state.is_error()]:
            masks[place] = self._mask_alone(*answers[place])[: masks.shape[1]]
        return masks.view(np.uint8)

    def _mask_alone(self, guide: Guide, output_ids: Sequence[int]) -> NDArray[np.int32]:
        """Return the mask of an answer from a grammar of its own; one that allows all if there is an error again."""
        with self._lock:  # what exhausted the grammar stays in it: new answers get a fresh one
            if self._grammars.get(guide.constraint) is guide.grammar:
                del self._grammars[guide.constraint]
        state = guide.restart(self._compile(guide.constraint), output_ids)
        mask = np.frombuffer(state.compute_bitmask(), np.int32)
        if not state.is_error():
            return mask
        guide.error = f"the answer cannot be continued within its constraint: {_describe_stop(state)}"
        return np.full_like(mask, -1)


def _state(guide: Guide, output_ids: Sequence[int]) -> llguidance.LLMatcher | None:
    try:
        state = guide.advance_to(output_ids)
    except ValueError as error:  # of compilation
        guide.error = str(error)
        return None
    return state


def _describe_stop(state: llguidance.LLMatcher) -> str:
    """Return why a grammar cannot be continued, with the limit that it exceeds."""
    reason = (state.get_error().strip().splitlines() or [state.stop_reason()])[0]
    for words, limit in _LIMIT_WORDS.items():
        if words in reason:
            return f"{reason} (limit: {limit}); use shorter lengths and counts, or a simpler pattern"
    return reason


_LIMIT_WORDS = {
    "too many expressions": f"{_MAX_STEP_FUEL} steps of the lexer per token",
    "too many states": f"{_MAX_LEXER_STATES} states of the lexer",
    "fuel": f"{_MAX_STEP_FUEL} steps of the lexer per token",
    "items": "50000 items of the parser per token",
}


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
