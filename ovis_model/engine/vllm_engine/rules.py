"""What this project asks of the next token and vLLM has not: exact constraints, forced answers, our penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from ovis_model.config import OvisConfig
from ovis_model.engine.sampling import unpack_masks
from ovis_model.grammar.guides import Guide, Guides
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Constraint

CHECKPOINT = "ovis_checkpoint"  # the key of vLLM's additional configuration


@dataclass
class Rule:
    """The rule of one request, and the token ids that it has generated, which vLLM appends to."""

    output_ids: list[int]
    forced: Sequence[int] = ()
    penalty: float = 1.0
    guide: Guide | None = field(default=None)


class AnswerRules(LogitsProcessor):  # type: ignore[misc]  # vLLM has no type information for us
    """Masks of constraints, forced tokens, and the penalty on repetition of the answer's own tokens.

    A request names its rule in `extra_args`: {"constraint": (kind, spec)}, {"forced": ids} or {"penalty": number}.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        checkpoint = Path(vllm_config.additional_config[CHECKPOINT])
        config = OvisConfig.from_directory(checkpoint)
        self._guides = Guides(load_tokenizer(checkpoint), config.language.vocab_size, config.eos_token_ids)
        self._rules: dict[int, Rule] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: the rules decide which token is the most probable."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they enter, leave and move in the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rules.pop(index, None)
        for index, params, _, output_ids in batch_update.added:
            self._rules.pop(index, None)
            if rule := self._make_rule(params.extra_args or {}, output_ids):
                self._rules[index] = rule
        for source, target, direction in batch_update.moved:
            self._move(source, target, is_swap=direction == MoveDirectionality.SWAP)

    def apply(self, logits: Tensor) -> Tensor:
        """Apply the rules to logits [B, vocab_size], in place."""
        for index, rule in self._rules.items():
            if rule.forced:
                _force(logits[index], rule.forced[len(rule.output_ids)])
            elif rule.penalty != 1 and rule.output_ids:
                _penalize(logits[index], rule)
        self._constrain(logits)
        return logits

    def _make_rule(self, arguments: dict[str, Any], output_ids: list[int]) -> Rule | None:
        if not arguments:
            return None
        rule = Rule(output_ids, arguments.get("forced", ()), arguments.get("penalty", 1.0))
        if constraint := arguments.get("constraint"):
            rule.guide = self._guides.make_guide(Constraint(*constraint))
        return rule

    def _move(self, source: int, target: int, *, is_swap: bool) -> None:
        moved, replaced = self._rules.pop(source, None), self._rules.pop(target, None)
        if moved:
            self._rules[target] = moved
        if replaced and is_swap:
            self._rules[source] = replaced

    def _constrain(self, logits: Tensor) -> None:
        guided = {index: rule for index, rule in self._rules.items() if rule.guide}
        if not guided:
            return
        answers = [(rule.guide, rule.output_ids) for rule in guided.values() if rule.guide]
        masks = torch.from_numpy(np.ascontiguousarray(self._guides.compute_masks(answers).result()))
        allowed = unpack_masks(masks.to(logits.device), logits.shape[1])
        rows = torch.tensor([*guided], device=logits.device)
        logits[rows] = torch.where(allowed, logits[rows], -math.inf)


def _force(row: Tensor, token_id: int) -> None:
    kept = row[token_id].clone()
    row.fill_(-math.inf)
    row[token_id] = kept


def _penalize(row: Tensor, rule: Rule) -> None:
    ids = torch.tensor(sorted(set(rule.output_ids)), device=row.device)
    row[ids] = torch.where(row[ids] > 0, row[ids] / rule.penalty, row[ids] * rule.penalty)
