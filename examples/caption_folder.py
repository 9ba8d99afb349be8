"""Caption a folder of images, then read the captions.

    python examples/caption_folder.py FOLDER OUTPUT [MODEL]

`make demo` draws images in demo_output/pictures. MODEL is "demo" unless given; AIDC-AI/Ovis2-1B reads photographs.
"""

from __future__ import annotations

import sys

import pandas as pd

from pipelines.config import CaptionConfig
from pipelines.pipeline import run_pipeline


def caption_folder(folder: str, output: str, model: str = "demo") -> None:
    """Write one row per image to OUTPUT, and print the captions. Run it again to resume it."""
    # The fields are the command line's options: --max-new-tokens is max_new_tokens.
    config = CaptionConfig(input=(folder,), output=output, model=model, max_new_tokens=64)
    summary = run_pipeline(config)
    print(f"{summary.ok} captions, {summary.error} errors, {summary.skipped_done} already there")

    rows = pd.read_parquet(f"{output}/data")
    for row in rows[rows["status"] == "ok"].itertuples():
        print(f"{row.uri}\t{row.text}")
    # A file that cannot be read does not stop the run: its row says why.
    for row in rows[rows["status"] == "error"].itertuples():
        print(f"{row.uri}\t{row.stage}: {row.error}", file=sys.stderr)


if __name__ == "__main__":
    caption_folder(*sys.argv[1:])
