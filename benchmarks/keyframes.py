"""Measure the CPU time of MDP3 on one thread, on drawn embeddings of width 1152, and of the published code if given.

    OMP_NUM_THREADS=1 python -m benchmarks.keyframes [PATH/TO/mdp3.py]

That file is `plugin/mdp3.py` of AIDC-AI/Ovis. Its selector runs unmodified, without its encoder.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ovis_model.inputs.keyframes import Rules, select_mdp3
from tests.support.frame_vectors import make_frames

WIDTH = 1152
CASES = ((128, 8, -1), (128, 32, -1), (128, 8, 32), (128, 32, 32), (512, 32, -1), (512, 32, 32))


def main(published: str | None) -> None:
    print("candidates frames segment  published ms  here ms  ratio  same picks")
    for count, k, segment_size in CASES:
        frames, query = (array.astype(np.float32) for array in make_frames(count, WIDTH))
        rules = Rules(segment_size=segment_size)
        picks = select_mdp3(frames, query, k, rules=rules).indices.tolist()
        here_ms = 1e3 * measure_median_s(partial(select_mdp3, frames, query, k, rules=rules), 15)
        line = f"{count:10} {k:6} {segment_size:7}"
        if published is None:
            print(f"{line}  {'':12}  {here_ms:7.2f}")
            continue
        select = load_published_selector(published, k, segment_size)
        theirs_ms = 1e3 * measure_median_s(partial(select, frames, query), 1 if count > 128 else 3)
        same = select(frames, query) == picks
        print(f"{line}  {theirs_ms:12.0f}  {here_ms:7.2f}  {theirs_ms / here_ms:5.0f}  {same}", flush=True)


def measure_median_s(work: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        start_s = time.process_time()
        work()
        seconds.append(time.process_time() - start_s)
    return statistics.median(seconds)


def load_published_selector(path: str, k: int, segment_size: int) -> Callable[[Any, Any], list[int]]:
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("published", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    selector = module.MDP3.__new__(module.MDP3)
    selector.n_selection, selector.segment_size = k, segment_size
    selector.lamda, selector.condition_size = 0.2, 1
    selector.kernel = module.MultiGaussianKernel(alphas=[2**power for power in range(-3, 2)])

    def select(frames: Any, query: Any) -> list[int]:
        with torch.no_grad():
            return [int(i) for i in selector._select_frames_fast(torch.tensor(frames), torch.tensor(query)[None])]

    return select


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
