"""Export a run in parts, so that a killed export resumes where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.errors import RunError
from pipelines.export.formats import FORMATS
from pipelines.export.items import ExportItem, find_caption, make_items
from pipelines.export.options import Exported, ExportOptions
from pipelines.export.selection import check_confidences, choose_rows, sort_files
from pipelines.report.opened import OpenedRun, open_output
from pipelines.storage import store
from pipelines.storage.preflight import check_stores

Json = dict[str, Any]

# Names that begin with _ are no input when the target is the INPUT of another run.
_STATE, _PARTS, ERRORS = "_export.json", "_parts", "_errors.jsonl"
_UPLOAD_BYTES = 64 << 20


@dataclass(frozen=True)
class _Part:
    """What is known of a written part: how many chosen rows it takes, and the rows whose media could not be read."""

    chosen: int
    errors: Sequence[Json]


def export_run(options: ExportOptions) -> Exported:
    """Export the chosen rows. The same call resumes an export that was stopped.

    Raise RunError if OUTPUT holds no run, or if TARGET holds another export; ValueError for wrong filters.
    """
    started_s = time.monotonic()
    check_stores([options.output, options.target])
    run = open_output(options.output)
    check_confidences(options.min_confidence, run.columns)
    find_caption(options.text, run.columns)
    if (counts := _begin(options, run)) is not None:
        return Exported(**{**counts, "skipped_done": counts["chosen"]})
    parts = _read_parts(options.target)
    num_skipped = sum(part.chosen for part in parts)
    for items in _group_items(options, _list_items(options, run, num_skipped)):
        parts.append(_write_part(options, len(parts), items))
    errors = _finish(options, run, parts)
    chosen = sum(part.chosen for part in parts)
    exported = Exported(
        rows=run.record["num_rows"],
        chosen=chosen,
        written=chosen - len(errors),
        error=len(errors),
        skipped_done=num_skipped,
        files=len(parts),
        seconds=round(time.monotonic() - started_s, 3),
        target=options.target,
    )
    _end(options, run, exported)
    return exported


def _list_items(options: ExportOptions, run: OpenedRun, num_done: int) -> Iterator[ExportItem]:
    """Yield the chosen rows after the first `num_done`, with their media."""
    to_skip = num_done
    for chosen in choose_rows(options, run):
        skipped = min(to_skip, len(chosen))
        to_skip -= skipped
        yield from make_items(options, run, chosen.slice(skipped))


def _group_items(options: ExportOptions, items: Iterator[ExportItem]) -> Iterator[list[ExportItem]]:
    """Yield the items of each part."""
    waiting: list[ExportItem] = []
    num_bytes = 0
    for item in items:
        waiting.append(item)
        num_bytes += item.num_bytes
        if len(waiting) >= options.rows_per_file or num_bytes >= options.file_size_mb * 2**20:
            yield waiting
            waiting, num_bytes = [], 0
    if waiting:
        yield waiting


def _begin(options: ExportOptions, run: OpenedRun) -> Json | None:
    """Write the state of the export; return the counts of an earlier call that has finished it.

    Raise RunError if an earlier call had other options or rows.
    """
    uri, identity = store.join(options.target, _STATE), _identify(options, run)
    if store.find_file(uri) is not None and not options.overwrite:
        found = json.loads(store.read_bytes(uri))
        if found["identity"] != identity:
            raise RunError(
                f"{options.target} holds an export with other options or of other rows; use another TARGET, "
                "or --overwrite"
            )
        counts: Json | None = found.get("counts")
        return counts
    others = [info.uri for info in store.list_files(options.target)]
    if others and not options.overwrite:
        raise RunError(f"{options.target} is not empty ({others[0]}); use another TARGET, or --overwrite")
    for other in others:
        store.remove(other)
    store.write_bytes(uri, json.dumps({"identity": identity}, indent=2).encode())
    return None


def _end(options: ExportOptions, run: OpenedRun, exported: Exported) -> None:
    """Record the counts and remove what was kept to resume."""
    state = {"identity": _identify(options, run), "counts": asdict(exported)}
    store.write_bytes(store.join(options.target, _STATE), json.dumps(state, indent=2).encode())
    for info in store.list_files(store.join(options.target, _PARTS)):
        store.remove(info.uri)
    store.remove_if_empty(store.join(options.target, _PARTS))


def _identify(options: ExportOptions, run: OpenedRun) -> Json:
    files = [[info.uri, info.num_bytes, int(entry.rows[0])] for info, entry in sort_files(run)]
    identity: Json = json.loads(json.dumps({"options": options.identity, "files": files}))
    return identity


def _read_parts(target: str) -> list[_Part]:
    """Return the parts that an earlier call has written, in order and without gaps."""
    parts: list[_Part] = []
    while store.find_file(uri := _locate_part(target, len(parts))) is not None:
        first_line = store.read_bytes(uri).split(b"\n", 1)[0]
        parts.append(_Part(**json.loads(first_line)))
    return parts


def _locate_part(target: str, number: int) -> str:
    return store.join(target, _PARTS, f"{number:06}.jsonl")


def _write_part(options: ExportOptions, number: int, items: Sequence[ExportItem]) -> _Part:
    """Write the items whose media were read, then the record of the part, which makes it count."""
    good = [item for item in items if not item.error]
    errors = [{"id": item.values["id"], "row": item.row, "error": item.error} for item in items if item.error]
    lines = FORMATS[options.format].write_part(options.target, number, good) if good else ()
    part = _Part(len(items), errors)
    head = json.dumps({"chosen": part.chosen, "errors": errors})
    store.write_bytes(_locate_part(options.target, number), "\n".join([head, *lines]).encode())
    return part


def _finish(options: ExportOptions, run: OpenedRun, parts: Sequence[_Part]) -> Sequence[Json]:
    """Join the lines of all parts, write the errors and return them."""
    kind = FORMATS[options.format]
    errors = [error for part in parts for error in part.errors]
    num_written = sum(part.chosen for part in parts) - len(errors)
    if errors:
        text = "".join(f"{json.dumps(error)}\n" for error in errors)
        store.write_bytes(store.join(options.target, ERRORS), text.encode())
    if kind.file_name:
        lines = iter([_describe_run(options, run, num_written)])
        joined = kind.join(lines if options.format == "hf" else _read_lines(options.target, len(parts)))
        _write_stream(store.join(options.target, kind.file_name), joined)
    return errors


def _read_lines(target: str, num_parts: int) -> Iterator[str]:
    for number in range(num_parts):
        yield from store.read_bytes(_locate_part(target, number)).decode().split("\n")[1:]


def _describe_run(options: ExportOptions, run: OpenedRun, num_written: int) -> str:
    questions = [(task.name, str(task.about.get("prompt"))) for task in run.columns.tasks]
    model = run.record.get("model") or {}
    about = {
        "name": options.target.rstrip("/").rsplit("/", 1)[-1],
        "rows": f"{num_written:,}",
        "model": f"{model.get('id')} (weights {model.get('weights')})",
        "filter": options.where or "none",
        "questions": questions,
    }
    return json.dumps(about)


def _write_stream(uri: str, blocks: Iterator[bytes]) -> None:
    """Write a file from blocks under a temporary name, then move it to its place."""
    temporary = f"{uri}{store.TEMPORARY_SUFFIX}"
    store.create_directory(uri.rsplit("/", 1)[0])
    fs, path = store.open_store(temporary)
    with fs.open(path, "wb", block_size=_UPLOAD_BYTES) as file:
        for block in blocks:
            file.write(block)
    store.move(temporary, uri)
