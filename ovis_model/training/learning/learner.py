"""Train on micro-batches of examples: a worker's model, optimizer and their state. Knows no data and no cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovis_model.config import OvisConfig
from ovis_model.network.ovis import Ovis
from ovis_model.training.batch import Batch, collate
from ovis_model.training.examples import PreferenceExample, TrainingExample
from ovis_model.training.export import load_network, make_network
from ovis_model.training.learning.parallel import World, gather, scatter, shard_model
from ovis_model.training.lora import LoraConfig, add_adapters
from ovis_model.training.model import Precision, TrainingModel
from ovis_model.training.optimizer import Optimizer, Schedule
from ovis_model.training.parts import choose_trainable, draw_visual_table, group_parameters, list_trainable
from ovis_model.training.preference import collate_pairs, compute_preference_loss, compute_reference

Initialization = Literal["none", "table", "all"]
Reference = NDArray[np.float32]
"""float32[P, 2]: log-probabilities of the chosen and the rejected answer of each pair under the reference."""


@dataclass(frozen=True, kw_only=True)
class LearnerOptions:
    """What is trained and how; the fields are those of `TrainingModel`, `group_parameters` and `Optimizer`.

    parts: as `choose_trainable` takes them. initialize: weights to draw at the start.
    is_preference: examples are pairs. beta, nll_weight: see `compute_preference_loss`.
    """

    parts: str
    schedule: Schedule
    learning_rate: float
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    initialize: Initialization = "none"
    lora: LoraConfig | None = None
    precision: Precision = "float32"
    checkpoint_layers: bool = True
    is_preference: bool = False
    beta: float = 0.1
    nll_weight: float = 0.0
    seed: int = 0
    shard: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one kind that are computed at once, with the `reference` of pairs.

    is_filler: it only keeps a worker in step with the others; nothing is learnt from it.
    """

    examples: Sequence[TrainingExample] | Sequence[PreferenceExample]
    reference: Reference | None = None
    is_filler: bool = False


@dataclass
class Totals:
    """Sums over micro-batches: the loss, what it is divided by (ids or pairs), tokens, and measures of pairs."""

    loss: float = 0.0
    num_targets: float = 0.0
    num_tokens: float = 0.0
    num_right: float = 0.0
    margin: float = 0.0
    chosen_reward: float = 0.0
    chosen_logprob: float = 0.0
    rejected_logprob: float = 0.0

    def describe(self, *, is_preference: bool, prefix: str = "") -> dict[str, float]:
        """Return the mean of each measure, by the name of its metric."""
        count = max(1.0, self.num_targets)
        means = {"loss": self.loss / count}
        if is_preference:
            means |= {
                "reward_accuracy": self.num_right / count,
                "reward_margin": self.margin / count,
                "chosen_reward": self.chosen_reward / count,
                "chosen_logprob": self.chosen_logprob / count,
                "rejected_logprob": self.rejected_logprob / count,
            }
        return {f"{prefix}{name}": value for name, value in means.items()}


class Learner:
    """The model of one worker, whole or divided, and its optimizer. All workers call its methods together."""

    def __init__(self, directory: Path, options: LearnerOptions, device: torch.device, world: World) -> None:
        """Load the checkpoint in `directory`. Raise ConfigError, WeightsError or PartError."""
        self._options, self._world, self._device = options, world, device
        torch.manual_seed(options.seed)
        # A model that is to be divided may not fit on one device: each layer is moved when it is divided.
        network = _load(directory, options, torch.device("cpu") if self._is_sharded else device)
        self._model = TrainingModel(network, precision=options.precision, checkpoint_layers=options.checkpoint_layers)
        if self._is_sharded:
            shard_model(self._model, world, device)
        groups = group_parameters(network, options.learning_rate, options.learning_rates, options.weight_decay)
        self._optimizer = Optimizer(groups, options.schedule, betas=options.betas, max_grad_norm=options.max_grad_norm)

    @property
    def network(self) -> Ovis:
        """The network; its parameters are parts if the model is divided."""
        return self._model.network

    @property
    def num_steps_done(self) -> int:
        """The steps so far, including those before a checkpoint."""
        return self._optimizer.step_number

    def step(self, micro_batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Update the weights by this worker's micro-batches and those of the others; return the step's metrics.

        The gradient is the sum over all ids that are learnt, divided by their number: it does not depend on how rows
        are distributed. Raise GradientError if it is not finite.
        """
        totals = self._sum(self._run(micro_batches, trains=True))
        if not self._is_sharded:
            self._world.sum_gradients(list_trainable(self.network).values())
        report = self._optimizer.step(int(totals.num_targets))
        return {
            **totals.describe(is_preference=self._options.is_preference),
            "grad_norm": report.gradient_norm,
            "learning_rate": max(report.learning_rates.values()),
            "num_targets": totals.num_targets,
            "num_tokens": totals.num_tokens,
        }

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> Totals:
        """Return the sums over the micro-batches of all workers, without learning."""
        with torch.no_grad():
            return self._sum(self._run(micro_batches, trains=False))

    def measure_reference(self, pairs: Sequence[PreferenceExample]) -> Reference:
        """Return the log-probabilities of pairs under the present weights."""
        return compute_reference(self._model, self._collate(pairs)).float().cpu().numpy()

    def get_state(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield what a checkpoint holds, by name: trained weights, the optimizer's state, torch's random state."""
        for name, parameter in list_trainable(self.network).items():
            yield f"model.{name}", _to_numpy(gather(parameter.detach()))
        for name, value in self._optimizer.get_state().items():
            yield f"optimizer.{name}", _to_numpy(gather(value))
        yield "random", torch.get_rng_state().numpy()

    @torch.no_grad()
    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a checkpoint. Raise ValueError if it belongs to other parameters."""
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        torch.set_rng_state(tensors.pop("random"))
        parameters = list_trainable(self.network)
        stored = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
        if stored.keys() != parameters.keys():
            odd = sorted(stored.keys() ^ parameters.keys())[0]
            raise ValueError(f"the checkpoint trains other parameters, such as {odd}; resume with the same options")
        for name, parameter in parameters.items():
            parameter.copy_(scatter(stored[name], parameter))
        moments = {name.removeprefix("optimizer."): x for name, x in tensors.items() if name.startswith("optimizer.")}
        owners = ((name, parameters.get(name.rpartition(".")[0])) for name in moments)
        self._optimizer.set_state({n: moments[n] if p is None else scatter(moments[n], p) for n, p in owners})

    @property
    def _is_sharded(self) -> bool:
        return self._options.shard and self._world.size > 1

    def _sum(self, totals: Totals) -> Totals:
        return Totals(*self._world.sum_values(list(vars(totals).values()), self._device))

    def _run(self, micro_batches: Iterable[MicroBatch], *, trains: bool) -> Totals:
        totals = Totals()
        for micro_batch in micro_batches:
            loss, added = self._compute(micro_batch)
            if trains:
                (loss * 0 if micro_batch.is_filler else loss).backward()  # type: ignore[no-untyped-call]
            if not micro_batch.is_filler:
                _add(totals, added)
        return totals

    def _compute(self, micro_batch: MicroBatch) -> tuple[Tensor, Totals]:
        batch = self._collate(micro_batch.examples)
        if micro_batch.reference is None:
            loss, count = self._model.loss_sum(batch)
            return loss, Totals(float(loss.detach()), count, len(batch.input_ids))
        found = compute_preference_loss(
            self._model,
            batch,
            torch.from_numpy(micro_batch.reference),
            beta=self._options.beta,
            nll_weight=self._options.nll_weight,
        )
        margins = found.chosen_rewards - found.rejected_rewards
        sums = (margins > 0).sum(), margins.sum(), found.chosen_rewards.sum()
        logprobs = found.chosen_logprobs.sum(), found.rejected_logprobs.sum()
        measures = [float(x) for x in (found.sum.detach(), *sums, *logprobs)]
        return found.sum, Totals(measures[0], len(margins), len(batch.input_ids), *measures[1:])

    def _collate(self, examples: Sequence[Any]) -> Batch:
        lay_out = collate_pairs if isinstance(examples[0], PreferenceExample) else collate
        return lay_out(examples, self.network.config.vision).to(self._device)


def _load(directory: Path, options: LearnerOptions, device: torch.device) -> Ovis:
    generator = torch.Generator().manual_seed(options.seed)
    if options.initialize == "all":
        network = make_network(OvisConfig.from_directory(directory), options.seed).to(device)
    else:
        network = load_network(directory, device)
    if options.initialize != "none":
        draw_visual_table(network, generator)
    if options.lora is not None:
        add_adapters(network, options.lora, generator)
    choose_trainable(network, options.parts)
    return network


def add_totals(parts: Iterable[Totals]) -> Totals:
    """Return the sums of sums."""
    whole = Totals()
    for part in parts:
        _add(whole, part)
    return whole


def _add(totals: Totals, added: Totals) -> None:
    for name, value in vars(added).items():
        setattr(totals, name, getattr(totals, name) + value)


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array
