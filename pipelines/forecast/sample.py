"""Prepare some rows in a child process: what cannot be read, tiles, prompt tokens, and CPU time per row.

`python -m pipelines.forecast.sample FD PARENT` runs the child. A decoder that crashes ends it, not the plan.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ovis_model.child_process import ChildProcess, MessageStream, StreamEnded, end_with_parent
from pipelines.cluster.attempts import DIED, AttemptCounts
from pipelines.cluster.process_limits import read_descendants_cpu_s
from pipelines.config import RunConfig
from pipelines.errors import StoreFault
from pipelines.forecast.contents import describe_quantiles, spread
from pipelines.monitoring.error_reasons import normalize_reason
from pipelines.preprocess import Preprocess
from pipelines.rows import PreparedRow

Json = dict[str, Any]

MAX_SAMPLE, MAX_SAMPLE_S = 200, 60.0
_MAX_ROW_S = 60.0  # for the last row; a run would wait longer
_MAX_DEATHS = 10  # of the child; each costs a start
_MODULE = "pipelines.forecast.sample"


@dataclass(frozen=True)
class SampledRow:
    """What is known of a row once it is prepared; `stage` and `error` are empty unless it failed.

    cpu_s: of the process and of its video decoder; nan if the process died.
    """

    stage: str
    error: str
    num_images: int = 0
    num_tiles: int = 0
    num_prompt_tokens: int = 0
    cpu_s: float = float("nan")


@dataclass(frozen=True)
class PreparedSample:
    """Rows that were prepared."""

    rows: list[SampledRow]

    @property
    def ok(self) -> list[SampledRow]:
        """The rows that can be generated."""
        return [row for row in self.rows if not row.stage]

    @property
    def cpu_s(self) -> list[float]:
        """CPU seconds per row; the first one, which loads what the others use, counts only if it is alone."""
        known = [row.cpu_s for row in self.rows if row.cpu_s == row.cpu_s]
        return known[1:] or known

    @property
    def mean_cpu_s(self) -> float:
        """Mean CPU seconds per row."""
        return float(np.mean(self.cpu_s or [0.0]))

    def describe(self) -> Json:
        """Return counts, reasons and quantiles for JSON."""
        failed = [normalize_reason(row.stage, row.error) for row in self.rows if row.stage]
        ok = self.ok
        return {
            "rows": len(self.rows),
            "unreadable": len(failed),
            "reasons": {reason: failed.count(reason) for reason in dict.fromkeys(failed)},
            "images_per_row": describe_quantiles(np.array([row.num_images for row in ok])),
            "tiles_per_row": describe_quantiles(np.array([row.num_tiles for row in ok])),
            "prompt_tokens_per_row": describe_quantiles(np.array([row.num_prompt_tokens for row in ok])),
            "cpu_s_per_row": describe_quantiles(np.array(self.cpu_s)),
        }


def prepare_sample(
    config: RunConfig, place: str, revision: str | None, num_rows: int, *, module: str = _MODULE
) -> PreparedSample:
    """Prepare up to MAX_SAMPLE rows of the manifest in `place`, spread over it, for at most MAX_SAMPLE_S.

    Frames that an encoder would choose are spread evenly instead, which costs nearly the same on a CPU. Raise
    StoreFault if the store of the images does not answer.
    """
    uniform = config.model_copy(update={"frame_selection": "uniform"}) if config.needs_encoder else config
    numbers = np.random.default_rng(0).permutation(spread(num_rows, MAX_SAMPLE)).tolist()
    rows: list[SampledRow] = []
    ends_s = time.monotonic() + MAX_SAMPLE_S
    for _ in range(_MAX_DEATHS):
        if len(rows) == len(numbers) or (rows and time.monotonic() > ends_s):
            break
        rows += _prepare_until_death(module, (place, revision, uniform), numbers[len(rows) :], ends_s)
    return PreparedSample(rows)


def _prepare_until_death(
    module: str, settings: tuple[str, str | None, RunConfig], numbers: list[int], ends_s: float
) -> Iterator[SampledRow]:
    """Yield the rows until the time is over or the child dies; the row on which it did so is the last one."""
    with closing(ChildProcess(module)) as child:
        stream = MessageStream(child.socket, ends_s + _MAX_ROW_S)
        try:
            stream.send({}, pickle.dumps(settings))
            for number in numbers:
                stream.send({"row": number})
                reply = stream.receive_json()
                if fault := reply.pop("fault", ""):
                    raise StoreFault(fault)
                del reply["num_bytes"]
                yield SampledRow(**reply)
                if time.monotonic() > ends_s:
                    return
        except (StreamEnded, ConnectionError):
            yield SampledRow("decode", DIED)
        except TimeoutError:
            yield SampledRow("decode", f"not prepared within {_MAX_ROW_S:.0f} s")


def main(fd: int, parent: int) -> None:
    """Prepare the rows that the parent asks for, until it closes the socket."""
    end_with_parent(parent)
    stream = MessageStream(socket.socket(fileno=fd))
    place, revision, config = pickle.loads(stream.receive(stream.receive_json()["num_bytes"]).tobytes())
    private = config.allow_private_addresses
    stage = Preprocess(
        place, config.model, revision, config, config.questionnaire, AttemptCounts(), allow_private_addresses=private
    )
    while True:
        try:
            number = stream.receive_json()["row"]
        except (StreamEnded, ConnectionError):
            return
        stream.send(_prepare(stage, number))


def _prepare(stage: Preprocess, number: int) -> Json:
    decoders_s, own_s = read_descendants_cpu_s(os.getpid()), time.process_time()
    try:
        [batch] = stage({"start": np.array([number]), "stop": np.array([number + 1])})
    except StoreFault as fault:
        return {"fault": str(fault)}
    cpu_s = time.process_time() - own_s + read_descendants_cpu_s(os.getpid()) - decoders_s
    [row] = PreparedRow.from_columns(batch)
    return asdict(
        SampledRow(row.stage, row.error, row.num_images, row.num_tiles, row.num_prompt_tokens, max(0.0, cpu_s))
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
