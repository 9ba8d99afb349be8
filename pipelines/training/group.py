"""The workers of a run as one group of Ray actors: called together, killed together, started again together.

Not Ray Train: its worker group restarts in the same way, but data positions, checkpoints in any store and errors with
their causes would still be ours, and it brings further dependencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from pipelines.cluster.ray_session import extract_error_line, find_cause
from pipelines.errors import RunError, WorkersDied
from pipelines.training.worker import MeetingPoint, TrainingWorker, WorkerSettings

_WAIT_FOR_DEATH_S = 20.0  # a rank that lost its peer fails before Ray reports that the peer has died


class WorkerGroup:
    """A context manager that holds the workers of one attempt; leaving it kills them."""

    def __init__(self, settings: WorkerSettings, cpus_per_worker: float) -> None:
        self._settings, self._cpus = settings, cpus_per_worker
        self._workers: list[Any] = []
        self._placement: Any = None

    def __enter__(self) -> Self:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gpus, size = int(self._settings.device == "cuda"), self._settings.config.num_workers
        bundle = {"CPU": self._cpus} | ({"GPU": gpus} if gpus else {})
        self._placement = placement_group([bundle] * size, strategy="PACK")
        actor = ray.remote(TrainingWorker)
        for rank in range(size):
            place = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            options = actor.options(
                num_cpus=self._cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy=place
            )
            self._workers.append(options.remote(self._settings, rank))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for worker in self._workers:
            ray.kill(worker)
        remove_placement_group(self._placement)

    def start(self, step: int | None) -> None:
        """Load model and checkpoint in all workers. Raise RunError if the model or the options do not fit."""
        import ray

        try:
            [place] = self._wait([self._workers[0].open_meeting_point.remote()])
            self.call("start", MeetingPoint(*place), step)
        except ray.exceptions.RayTaskError as error:
            if cause := find_cause(error, ValueError):
                raise RunError(str(cause)) from error
            raise

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all workers and return their results by rank. Raise WorkersDied if one died."""
        return self._wait([getattr(worker, method).remote(*arguments) for worker in self._workers])

    def _wait(self, calls: Sequence[Any]) -> list[Any]:
        import ray

        waiting = list(calls)
        while waiting:
            [done], waiting = ray.wait(waiting)
            try:
                ray.get(done)
            except ray.exceptions.RayActorError as error:
                raise WorkersDied(extract_error_line(error)) from error
            except ray.exceptions.RayTaskError as error:
                if death := find_cause(error, ray.exceptions.RayActorError):  # of a process that prepares rows
                    raise WorkersDied(extract_error_line(death)) from error
                self._raise_if_peer_died(waiting, error)
                raise
        return list(ray.get(calls))

    def _raise_if_peer_died(self, waiting: Sequence[Any], failure: Exception) -> None:
        """Raise WorkersDied if the failure of a worker may follow from the death of another one."""
        import ray

        rest = list(waiting)
        while rest:
            found, rest = ray.wait(rest, timeout=_WAIT_FOR_DEATH_S)
            if not found:
                return
            try:
                ray.get(found)
            except ray.exceptions.RayActorError as error:
                raise WorkersDied(extract_error_line(error)) from failure
            except ray.exceptions.RayTaskError:
                continue
