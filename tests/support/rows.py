"""List INPUT into manifest rows."""

from __future__ import annotations

from typing import Any

from pipelines.config import CaptionConfig
from pipelines.sources import list_rows

Row = dict[str, Any]


def list_input(*inputs: object, **options: object) -> list[Row]:
    """Return the manifest rows of `inputs`, without row numbers."""
    config = make_config(*inputs, **options)
    with list_rows(config, config.questionnaire) as listing:
        return [row for table in listing.read_tables() for row in table.to_pylist()]


def make_config(*inputs: object, **options: object) -> CaptionConfig:
    values = {"input": tuple(map(str, inputs)), "output": "out", "model": "demo", **options}
    return CaptionConfig(**values)  # type: ignore[arg-type]
