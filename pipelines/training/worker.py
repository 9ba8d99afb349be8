"""A worker of a training run: one rank with its share of the rows of each step. The only part that loads torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovis_model.checkpoint import fetch_checkpoint
from pipelines.cluster.actor import register_fast_exit
from pipelines.storage import store
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.config import TrainConfig
from pipelines.training.data.loader import LoaderPool, RowSource
from pipelines.training.data.order import RowOrder, Rows, share_rows
from pipelines.training.data.prepare import AnyExample
from pipelines.training.metrics import Metrics

if TYPE_CHECKING:
    from ovis_model.training.learning.learner import LearnerOptions, MicroBatch, Totals


@dataclass(frozen=True, eq=False)
class WorkerSettings:
    """What all workers of a run share.

    held_out: rows for the validation loss, by their data set. shown: rows to answer.
    threads: of torch on a CPU; their number decides the last bits of sums.
    """

    config: TrainConfig
    source: RowSource
    order: RowOrder
    held_out: Mapping[str, tuple[int, ...]]
    shown: tuple[int, ...]
    num_steps: int
    device: Literal["cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    threads: int
    checkpoints: Checkpoints


class MeetingPoint(NamedTuple):
    """Where the workers meet: rank 0's address."""

    host: str
    port: int


class _Share(NamedTuple):
    """A micro-batch of this worker in a step."""

    step: int
    rows: Sequence[int]
    is_filler: bool


class TrainingWorker:
    """One rank. All ranks get the same calls in the same order, because they exchange gradients in them."""

    def __init__(self, settings: WorkerSettings, rank: int) -> None:
        """Load torch only; `start` loads the model."""
        register_fast_exit()
        import torch

        self._settings, self._rank, self._size = settings, rank, settings.config.num_workers
        if settings.device == "cpu":
            torch.set_num_threads(settings.threads)
        self._device = torch.device(settings.device)
        self._meeting: Any = None
        self._session = ExitStack()
        self._reference: NDArray[np.float32] | None = None

    def open_meeting_point(self) -> MeetingPoint:
        """Open the place where the others join this rank."""
        import ray

        from ovis_model.training.learning.parallel import open_meeting_point

        host = ray.util.get_node_ip_address()
        self._meeting = open_meeting_point(host, self._size)
        return MeetingPoint(host, self._meeting.port)

    def start(self, place: MeetingPoint, step: int | None) -> None:
        """Join the others and load the model, and the checkpoint of `step` if given. Raise ValueError or OSError."""
        from ovis_model.training.learning.learner import Learner
        from ovis_model.training.learning.parallel import World, find_meeting_point, join_world

        meeting = self._meeting or find_meeting_point(place.host, place.port, self._size)
        world = self._session.enter_context(join_world(World(self._rank, self._size), meeting, self._device))
        self._learner = Learner(self._directory, make_learner_options(self._settings), self._device, world)
        if step is not None:
            self._learner.set_state(dict(self._settings.checkpoints.read_tensors(step)))
        config = self._settings.config
        self._loaders = LoaderPool(self._settings.source, config.dataloader_num_workers)
        self._steps = groupby(self._loaders.load_ahead(self._share_steps(step or 0)), lambda pair: pair[0].step)

    def set_reference(self, reference: NDArray[np.float32]) -> None:
        """Set the reference's log-probabilities of all rows, float32[num_rows, 2]."""
        self._reference = reference

    def train(self, until: int) -> list[Metrics]:
        """Do the steps up to `until` and return the metrics of each."""
        lines: list[Metrics] = []
        while self._learner.num_steps_done < until:
            _, pairs = next(self._steps)
            lines.append(self._learner.step(self._make_micro_batch(*pair) for pair in pairs))
        return lines

    def evaluate(self) -> Metrics:
        """Return the means over all held-out rows, and the loss of each data set if there are several."""
        from ovis_model.training.learning.learner import add_totals

        found = {name: self._sum_losses(rows) for name, rows in self._settings.held_out.items()}
        means = add_totals(found.values()).describe(is_preference=self._settings.config.is_preference, prefix="eval_")
        losses = {f"eval_{name}_loss": totals.loss / max(1.0, totals.num_targets) for name, totals in found.items()}
        return {**means, **losses} if len(found) > 1 else means

    def _sum_losses(self, rows: Sequence[int]) -> Totals:
        shares = ((share, share.rows) for share in self._share(0, np.array(rows, np.int64)))
        return self._learner.evaluate(self._make_micro_batch(*pair) for pair in self._loaders.load_ahead(shares))

    def measure_reference(self, rows: Sequence[int]) -> list[tuple[int, float, float]]:
        """Return (row, chosen, rejected) for this worker's share of rows: log-probabilities under the present model."""
        shares = ((share, share.rows) for share in self._share(0, np.array(rows, np.int64)))
        found: list[tuple[int, float, float]] = []
        for share, examples in self._loaders.load_ahead(shares):
            measured = self._learner.measure_reference(examples)  # type: ignore[arg-type]
            if not share.is_filler:
                found += [(row, *pair) for row, pair in zip(share.rows, measured.tolist(), strict=True)]
        return found

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of a step. Raise OSError or StoreFault."""
        tensors = self._learner.get_state()
        if self._rank == 0:
            self._settings.checkpoints.write(step, tensors, state)
        else:
            for _ in tensors:  # a divided tensor is gathered by all
                pass

    def answer(self) -> list[dict[str, str]]:
        """Answer the rows to show; ranks other than 0 return nothing."""
        import torch

        from ovis_model.tokenizer import load_tokenizer
        from ovis_model.training.learning.answers import answer_examples, copy_for_inference

        network = self._get_network()
        if self._rank or not self._settings.shown:
            return []
        model = copy_for_inference(network, self._device, getattr(torch, self._settings.precision))
        [(_, examples)] = self._loaders.load_ahead([(None, self._settings.shown)])
        return [asdict(x) for x in answer_examples(model, load_tokenizer(self._directory), examples)]

    def export(self, model_uri: str, adapter_uri: str, facts: dict[str, Any]) -> None:
        """Write the model, or with LoRA the adapters and, if wanted, the model with them. Raise OSError."""
        from ovis_model.training.export import export_network
        from ovis_model.training.lora import save_adapters

        network, options = self._get_network(), make_learner_options(self._settings)
        if self._rank:
            return
        with TemporaryDirectory(prefix="ovis2-model-") as directory:
            if options.lora is not None:
                save_adapters(network, options.lora, Path(directory), self._settings.config.model)
                upload_directory(Path(directory), adapter_uri)
        if options.lora is None or self._settings.config.merge:
            with TemporaryDirectory(prefix="ovis2-model-") as directory:
                export_network(network, self._directory, Path(directory), facts)
                upload_directory(Path(directory), model_uri)

    def _get_network(self) -> Any:
        """Return the whole network; if it is divided, by a call of all workers, and on rank 0 only."""
        from ovis_model.training.learning.parallel import World, gather_network

        network, is_divided = self._learner.network, self._settings.config.fsdp and self._size > 1
        lora = make_learner_options(self._settings).lora
        return gather_network(network, World(self._rank, self._size), lora) if is_divided else network

    @property
    def _directory(self) -> Path:
        config = self._settings.config
        return fetch_checkpoint(config.model, config.revision, weights=config.initialize != "all")

    def _share_steps(self, first: int) -> Iterator[tuple[_Share, Sequence[int]]]:
        for step in range(first, self._settings.num_steps):
            for share in self._share(step, self._settings.order.get_rows(step)):
                yield share, share.rows

    def _share(self, step: int, rows: Rows) -> Iterable[_Share]:
        """Return this worker's micro-batches of `rows`; in place of one that it lacks, a filler."""
        size = self._settings.config.per_device_train_batch_size
        for mine in share_rows(rows, size, self._size)[self._rank]:
            yield _Share(step, (mine if len(mine) else rows[:1]).tolist(), not len(mine))

    def _make_micro_batch(self, share: _Share, examples: list[AnyExample]) -> MicroBatch:
        from ovis_model.training.learning.learner import MicroBatch

        reference = None if self._reference is None else self._reference[list(share.rows)]
        return MicroBatch(examples, reference, share.is_filler)  # type: ignore[arg-type]


def upload_directory(source: Path, uri: str) -> None:
    """Copy a flat directory to a store, config.json last: without it there is no model. Raise OSError or StoreFault."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        store.write_bytes(store.join(uri, path.name), path.read_bytes())


def make_learner_options(settings: WorkerSettings) -> LearnerOptions:
    """Return what the options of a run mean for the model."""
    from ovis_model.training.learning.learner import LearnerOptions
    from ovis_model.training.lora import LoraConfig
    from ovis_model.training.optimizer import Schedule

    config = settings.config
    return LearnerOptions(
        parts=config.parts,
        schedule=Schedule(
            num_steps=settings.num_steps, decay=config.lr_scheduler_type, warmup_ratio=config.warmup_ratio
        ),
        learning_rate=config.peak_learning_rate,
        learning_rates=config.part_learning_rates,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        max_grad_norm=config.max_grad_norm,
        initialize=config.initialize,
        lora=LoraConfig(config.lora_rank, config.lora_alpha) if config.lora_rank else None,
        precision=settings.precision,
        checkpoint_layers=config.gradient_checkpointing,
        is_preference=config.is_preference,
        beta=config.beta,
        nll_weight=config.rpo_alpha,
        seed=config.seed,
        shard=config.fsdp,
    )
