"""Turn what the workers report into lines of metrics, a page, and TensorBoard's files if that is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.storage import store
from pipelines.training.config import TrainConfig
from pipelines.training.metrics import MetricLog, Metrics
from pipelines.training.page import render_training_page
from pipelines.training.record import TrainingRun
from pipelines.training.worker import WorkerSettings

_SUMMED = ("num_targets", "num_tokens")
_LAST = ("grad_norm", "learning_rate")


class Telemetry:
    """The measurements of a run, from the step that it continues at."""

    def __init__(self, config: TrainConfig, run: TrainingRun, settings: WorkerSettings, first_step: int) -> None:
        self._config, self._run, self._settings = config, run, settings
        self._log = MetricLog(run.output, until_step=first_step)
        self._board = _open_board(run.output)
        self._num_tokens, self._seconds = 0.0, 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all workers, of this command only."""
        return self._num_tokens / max(self._seconds, 1e-3)

    def add_steps(self, step: int, lines: Sequence[Metrics], seconds: float) -> None:
        """Add the steps since the last line as one: means by what is learnt, the last rate and norm."""
        self._num_tokens += sum(line["num_tokens"] for line in lines)
        self._seconds += seconds
        summary = summarize_steps(lines)
        epoch = round(step / self._settings.order.steps_per_epoch, 4)
        self.add(step, "train", {**summary, "epoch": epoch, "tokens_per_s": summary["num_tokens"] / max(seconds, 1e-6)})

    def add(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Add one line."""
        self._log.add([{"step": step, "kind": kind, **values}])
        for name, value in values.items():
            if self._board is not None and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def write(self) -> None:
        """Write OUTPUT/metrics.jsonl and OUTPUT/training.html. Raise OSError or StoreFault."""
        self._log.write()
        if self._board is not None:
            self._board.flush()
        facts = {name: str(value) for name, value in self.describe().items() if value is not None}
        page = render_training_page(f"Training, stage {self._config.stage}", facts, self._log)
        store.write_bytes(store.join(self._run.output, "training.html"), page.encode("utf-8", "backslashreplace"))

    def describe(self) -> dict[str, Any]:
        """Return facts about the run, for its page, its record and the model card."""
        config, order = self._config, self._settings.order
        losses, eval_losses = self._log.list_points("loss"), self._log.list_points("eval_loss")
        return {
            "stage": config.stage,
            "trained": f"LoRA of rank {config.lora_rank}" if config.lora_rank else config.parts,
            "start": config.model + (f" at {config.revision}" if config.revision else ""),
            "data": ", ".join(map(store.redact, config.input)),
            "rows": len(order.numbers),
            "held_out_rows": sum(map(len, self._settings.held_out.values())),
            "steps": losses[-1][0] if losses else 0,
            "rows_per_step": config.batch_size,
            "learning_rate": config.peak_learning_rate,
            "schedule": f"{config.lr_scheduler_type}, warm-up {config.warmup_ratio:g}",
            "seed": config.seed,
            "precision": self._settings.precision,
            "loss": losses[-1][1] if losses else None,
            "eval_loss": eval_losses[-1][1] if eval_losses else None,
            "versions": ", ".join(f"{k} {v}" for k, v in self._run.record["versions"].items()),
        }


def summarize_steps(lines: Sequence[Metrics]) -> Metrics:
    """Return one line for several steps: means weighted by what is learnt, sums of counts, the last rate and norm."""
    total = sum(line["num_targets"] for line in lines)
    summary = {name: sum(line[name] for line in lines) for name in _SUMMED}
    summary |= {name: lines[-1][name] for name in _LAST}
    means = [name for name in lines[0] if name not in summary]
    return {**{n: sum(line[n] * line["num_targets"] for line in lines) / total for n in means}, **summary}


def _open_board(output: str) -> Any:
    """Return a writer of TensorBoard's files; None if it is not installed, or OUTPUT is not a local directory."""
    if "://" in output:
        return None
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(store.join(output, "tensorboard"))
