"""Update parameters: AdamW with a learning rate per part, a schedule, and clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ovis_model.training.parts import ParameterGroup

Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rates as factors of the peak: a linear warm-up, then a decay to `min_factor` at `num_steps`."""

    num_steps: int
    decay: Decay = "cosine"
    warmup_ratio: float = 0.0
    min_factor: float = 0.0

    @property
    def num_warmup_steps(self) -> int:
        """The steps of the warm-up, rounded up."""
        return math.ceil(self.num_steps * self.warmup_ratio)

    def compute_factor(self, step: int) -> float:
        """Return the factor of a step, counted from 0. The last step of the warm-up has the peak rate."""
        warmup = self.num_warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.num_steps - warmup))
        left = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[self.decay]
        return self.min_factor + (1 - self.min_factor) * left


class GradientError(RuntimeError):
    """The gradients are not finite; no parameter was changed."""


@dataclass(frozen=True)
class StepReport:
    """What a step did: the global norm of the gradients before clipping, and the learning rate of each part."""

    gradient_norm: float
    learning_rates: Mapping[str, float]


class Optimizer:
    """AdamW over groups of parameters (arXiv:1711.05101). Its state is plain tensors by name."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        schedule: Schedule,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float = 1.0,
    ) -> None:
        """Take groups of `parts.group_parameters`; a `max_grad_norm` of 0 never clips."""
        self._groups, self._schedule, self._max_grad_norm, self.step_number = groups, schedule, max_grad_norm, 0
        self._parameters = {name: x for group in groups for name, x in group.parameters.items()}
        self._adam = torch.optim.AdamW(
            [{"params": [*group.parameters.values()], "weight_decay": group.weight_decay} for group in groups],
            betas=betas,
            eps=eps,
            fused=True,  # one pass over memory per parameter
        )

    def step(self, num_targets: int) -> StepReport:
        """Update the parameters by gradients of summed losses over `num_targets` learnt ids, or pairs; clear them.

        Raise GradientError if a gradient is not finite, and ValueError without targets; then nothing changes.
        """
        if num_targets < 1:
            raise ValueError("the step has nothing to learn from: none of its batches has a label; remove such rows")
        norm = self._scale_gradients(num_targets)
        rates = self._set_learning_rates()
        self._adam.step()
        self.clear_gradients()
        self.step_number += 1
        return StepReport(norm, rates)

    def clear_gradients(self) -> None:
        """Forget the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def _scale_gradients(self, num_targets: int) -> float:
        """Divide the gradients by the number of targets, clip them, and return their norm before clipping."""
        gradients = [x.grad for x in self._parameters.values() if x.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / num_targets
        if not math.isfinite(norm):
            raise GradientError(
                f"the gradients of step {self.step_number} have the norm {norm}; lower the learning rate or "
                "resume from a checkpoint before the weights diverged"
            )
        clip = min(1.0, self._max_grad_norm / (norm + 1e-6)) if self._max_grad_norm else 1.0
        torch._foreach_mul_(gradients, clip / num_targets)
        return norm

    def _set_learning_rates(self) -> dict[str, float]:
        factor = self._schedule.compute_factor(self.step_number)
        for group, adam_group in zip(self._groups, self._adam.param_groups, strict=True):
            adam_group["lr"] = group.learning_rate * factor
        return {group.part: group.learning_rate * factor for group in self._groups}

    def get_state(self) -> dict[str, Tensor]:
        """Return the state as tensors by name, for a safetensors file: the step and both moments of each parameter."""
        state = {"step": torch.tensor(self.step_number)}
        for name, parameter in self._parameters.items():
            for key, value in self._adam.state.get(parameter, {}).items():
                state[f"{name}.{key}"] = torch.as_tensor(value).contiguous()
        return state

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state. Raise ValueError if it belongs to other parameters."""
        names = {name.rpartition(".")[0] for name in state if "." in name}
        if names - self._parameters.keys():
            raise ValueError(
                f"the optimizer's state has {sorted(names - self._parameters.keys())[0]}, which is not trained; resume "
                "with the parts that the run began with"
            )
        self.step_number = int(state["step"])
        for name, parameter in self._parameters.items():
            moments = {key: state[f"{name}.{key}"] for key in _MOMENTS if f"{name}.{key}" in state}
            if moments:
                self._adam.state[parameter] = {k: x.to(parameter.device, copy=True) for k, x in moments.items()}


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
