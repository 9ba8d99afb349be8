"""One rank of a tensor-parallel replica: `python -m ovis_model.engine.rank_process FD`, started and owned by `ranks`.

The whole engine over a part of the model, in step with the other ranks.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ovis_model.engine.engine import OvisEngine, model_dtype, torch_device
from ovis_model.engine.rank_pool import Abandon, Call, Done, Fault, RankOptions, Ready, SignOfLife
from ovis_model.engine.scheduler import Row
from ovis_model.network.tensor_parallel import Shard, joined
from ovis_model.network.weights import load_model
from ovis_model.tokenizer import load_tokenizer
from ovis_model.types import Completion, EngineDied, RequestError

_SIGN_OF_LIFE_EVERY_S = 0.5

Message = Call | Abandon


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    link = Connection(int(sys.argv[1]))
    options: RankOptions = link.recv()
    inbox, pulse = Inbox(link, options.meeting_point.parent), Pulse(link)
    try:
        with joined(options.rank, options.size, options.meeting_point, pulse.beat) as shard:
            engine = _load(options, shard)
            link.send(Ready(engine.model.device.type))
            serve(engine, shard, inbox, link)
    except Exception as error:
        if not isinstance(error, EngineDied | ValueError):
            traceback.print_exc()
        with suppress(OSError):
            link.send(Fault(_told_by(options.rank, error)))
        sys.stderr.flush()
        # A communicator whose peer is gone may wait for it on the way out.
        os._exit(1)


def serve(engine: OvisEngine, shard: Shard, inbox: Inbox, link: Connection) -> None:
    """Take in calls and step, all ranks at the same steps; rank 0 tells the outcomes. Does not return."""
    calls: dict[int, list[Row]] = {}
    while True:
        if not calls:
            inbox.wait()  # as all ranks do now, so that nobody waits for the others while there is nothing to do
        for message in inbox.take(_agreed_arrivals(engine, shard, inbox)):
            if isinstance(message, Abandon):
                engine.abandon_rows()
            elif error := _enqueue(engine, message, calls):
                _tell(shard, link, message.number, error)
        engine.step()
        for number in [number for number, rows in calls.items() if all(row.has_left for row in rows)]:
            _tell(shard, link, number, _outcome(calls.pop(number)))


class Inbox:
    """What the owner sends, in order. When the owner is gone, so are this process and the ranks' `directory`."""

    def __init__(self, link: Connection, directory: Path) -> None:
        self._link, self._directory = link, directory
        self._changed = threading.Condition()
        self._messages: deque[Message] = deque()
        self._num_taken = 0
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    @property
    def num_arrived(self) -> int:
        """Messages since the start."""
        with self._changed:
            return self._num_taken + len(self._messages)

    def wait(self) -> None:
        """Until there is a message that was not taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages)

    def take(self, until: int) -> list[Message]:
        """All messages up to number `until`, waiting for those that are on their way."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_taken + len(self._messages) >= until)
            taken = [self._messages.popleft() for _ in range(until - self._num_taken)]
            self._num_taken = until
        return taken

    def _read(self) -> None:
        try:
            while True:
                message = self._link.recv()
                with self._changed:
                    self._messages.append(message)
                    self._changed.notify_all()
        except (EOFError, OSError):
            shutil.rmtree(self._directory, ignore_errors=True)
            os._exit(1)


class Pulse:
    """Signs of life to the owner, not more than it needs."""

    def __init__(self, link: Connection) -> None:
        self._link, self._last_s = link, time.monotonic()

    def beat(self) -> None:
        if time.monotonic() - self._last_s > _SIGN_OF_LIFE_EVERY_S:
            self._link.send(SignOfLife())
            self._last_s = time.monotonic()


def _load(options: RankOptions, shard: Shard) -> OvisEngine:
    device = torch_device(options.device)
    if device.type == "cuda":
        if options.size > torch.cuda.device_count():
            raise ValueError(
                f"tensor_parallel={options.size} needs as many CUDA devices; torch sees {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(options.rank)
    torch.set_num_threads(options.num_threads or max(1, torch.get_num_threads() // options.size))
    model = load_model(
        options.directory,
        device=device,
        dtype=model_dtype(options.dtype, device),
        post_trunk_norm=options.post_trunk_norm,
        shard=shard,
    )
    engine = OvisEngine(model, tokenizer=load_tokenizer(options.directory))
    if device.type == "cuda":
        engine.warm_up()
    if options.rank == 0:
        print(f"each of {options.size} ranks on {device}: {engine.describe()}", file=sys.stderr)
    return engine


def _agreed_arrivals(engine: OvisEngine, shard: Shard, inbox: Inbox) -> int:
    """How many messages have reached rank 0."""
    stats = engine.stats
    work = [stats.tiles, stats.prompt_tokens, stats.steps, stats.row_steps]
    num_arrived, *work_of_leader = shard.of_leader(torch.tensor([inbox.num_arrived, *work])).tolist()
    assert work == work_of_leader, f"rank {shard.rank} has done {work}, rank 0 {work_of_leader}"
    return int(num_arrived)


def _enqueue(engine: OvisEngine, call: Call, calls: dict[int, list[Row]]) -> Exception | None:
    try:
        calls[call.number] = engine.enqueue(call.requests, call.params)
    except ValueError as error:  # a request that is refused is no fault
        return error
    return None


def _outcome(rows: Iterable[Row]) -> list[Completion] | RequestError:
    try:
        return [row.completion() for row in rows]
    except RequestError as error:
        return error


def _tell(shard: Shard, link: Connection, number: int, outcome: Sequence[Completion] | Exception) -> None:
    if shard.rank == 0:
        link.send(Done(number, outcome if isinstance(outcome, Exception) else list(outcome)))


def _told_by(rank: int, error: Exception) -> Exception:
    """Of a type that the owner knows and that survives the way there."""
    if isinstance(error, EngineDied | ValueError):
        return error
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
