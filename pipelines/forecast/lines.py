"""Say a forecast in a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ovis_model.wording import count_nouns
from pipelines.forecast.forecast import Forecast

Json = dict[str, Any]


def describe_forecast(found: Forecast) -> Iterator[str]:
    """Yield the lines for users."""
    yield f"rows: {found.rows:,}, {found.rows_to_do:,} to do"
    for kind, counts in found.contents["kinds"].items():
        size = f", {counts['bytes'] / 1e9:.3g} GB" if "bytes" in counts else ""
        yield f"  {counts['rows']:,} {kind}{size}"
    if duplicates := found.contents["duplicate_ids"]:
        yield f"  {count_nouns(duplicates, 'row')} repeat an id"
    yield from _describe_sample(found.sample)
    if found.pools:
        yield f"pools: {found.pools}"
    if memory := found.memory:
        yield (
            f"memory of a replica: {memory['weight_gb']:.2f} GB of weights on each of {memory['ranks']}; up to "
            f"{memory['sequences']} sequences at once, {memory['cache_tokens']:,} tokens in the cache"
        )
    yield from _describe_rates(found)
    for reason in found.refused:
        yield f"refused: {reason}"
    if found.report:
        yield f"answers of the sample: {found.report}"


def _describe_sample(sample: Json) -> Iterator[str]:
    yield f"sample of {sample['rows']}: {sample['unreadable']} unreadable"
    for reason, count in sample["reasons"].items():
        yield f"  {count} {reason}"
    for name in ("tiles_per_row", "prompt_tokens_per_row", "cpu_s_per_row"):
        if values := sample[name]:
            yield (
                f"  {name.replace('_', ' ')}: 5 % below {values['p5']:g}, half below {values['p50']:g}, 95 % below "
                f"{values['p95']:g}, mean {values['mean']:g}"
            )


def _describe_rates(found: Forecast) -> Iterator[str]:
    if found.rows_per_s is None or found.eta_s is None:
        yield "no rows were run"
        return
    if found.estimated_from:
        yield f"an estimate, not measured, from {found.estimated_from}"
    stages = ", ".join(f"{stage} {rate:,.4g} rows/s" for stage, rate in found.stages.items())
    yield f"rate: {found.rows_per_s:,.4g} rows/s ({stages}); limited by: {found.limit}"
    cost = f", cost {found.cost:,.2f}" if found.cost is not None else ""
    hours, rest_s = divmod(round(found.eta_s), 3600)
    yield f"ETA: {hours}:{rest_s // 60:02}:{rest_s % 60:02}; {found.gpu_hours:.4g} GPU hours{cost}"
    if found.output_bytes is not None:
        yield f"output: about {found.output_bytes / 1e6:,.4g} MB"
