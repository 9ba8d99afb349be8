"""Load one rank's shard of a golden checkpoint and compute logits with it.

    python -m tests.support.rank_logits RANK SIZE FILE CHECKPOINT OUT

Writes the logits of every golden prompt and the number of decoder parameters in the shard.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from ovis_model.network.tensor_parallel import join_ranks
from ovis_model.network.weights import load_model
from pipelines.cluster.actor import exit_at_once
from tests.support.engines import compute_logits, make_golden_requests
from tests.support.golden_data import checkpoint_dir


def main() -> None:
    rank, size, meeting_point, checkpoint, out = sys.argv[1:]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    directory = checkpoint_dir(checkpoint)
    with join_ranks(int(rank), int(size), Path(meeting_point), lambda: None) as shard:
        model = load_model(directory, device=torch.device("cpu"), dtype=torch.float32, shard=shard)
        logits = [compute_logits(model, request)[-1] for request in make_golden_requests(checkpoint)]
    np.savez(out, *logits, llm_parameters=sum(p.numel() for p in model.llm.parameters()))
    exit_at_once()


if __name__ == "__main__":
    main()
