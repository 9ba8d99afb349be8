"""Extract a JSON record and a choice from each image of a folder, in columns of their own types.

    python examples/annotate_schema.py FOLDER OUTPUT [MODEL]

The questions are in examples/scene.yaml, the schema of the record in examples/scene.json. Every answer satisfies the
schema, because generation is held to it; the demo model was never taught records, so its values are guesses.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.config import AnnotateConfig
from pipelines.pipeline import run_pipeline

TASKS = Path(__file__).with_name("scene.yaml")


def annotate_folder(folder: str, output: str, model: str = "demo") -> None:
    """Ask every question about every image; each image is encoded once."""
    print(run_pipeline(AnnotateConfig(input=(folder,), output=output, model=model, tasks=str(TASKS))))

    table = pq.read_table(f"{output}/data")
    print(table.schema.field("scene").type)  # the schema as an Arrow struct: no JSON to parse
    for row in table.to_pylist():
        # `flags` names answers to distrust, e.g. scene:truncated; an answer that was cut is null.
        print(row["id"], row["scene"], row["background"], f"{row['background_confidence']}", row["flags"])


if __name__ == "__main__":
    annotate_folder(*sys.argv[1:])
