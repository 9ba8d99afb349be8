"""List and read real files of others: every row comes out, no message holds a trace, and nothing ends this process.

    python -m tests.stress.corpus PATH...

Each PATH is a file or a directory, such as a checkout of apache/parquet-testing or the folder of an installed package.
Tables without a usual suffix are found by content. Prints how often each outcome occurred, with an example, and exits
with 1 if a file breaks a rule.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines import schema
from pipelines.config import CaptionConfig
from pipelines.errors import MediaError, SourceError, TableError
from pipelines.media.fetch import Fetcher
from pipelines.media.images import decode_image
from pipelines.media.reference import is_seekable_video, parse_reference
from pipelines.sources import list_rows
from pipelines.sources.kinds import IMAGE_SUFFIXES, KINDS
from pipelines.storage.table_reader import get_processes

LIMIT_S = 60.0  # per file, on a shared machine
MAX_READ = 200  # images per shard

_CONTENTS = {b"PAR1": ".parquet", b"PARE": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
_TRACE = re.compile(r'Traceback|File "|\n|\w+(Error|Exception|Invalid)\(|object at 0x')

Options = dict[str, Any]


def main() -> None:
    logging.disable()
    outcomes: dict[str, list[str]] = defaultdict(list)
    broken = list[str]()
    fetcher = Fetcher()
    with tempfile.TemporaryDirectory() as links:
        for path in find_inputs(map(Path, sys.argv[1:]), Path(links)):
            for options in choose_options(path):
                started_s = time.monotonic()
                outcome, faults = check_input(path, options, fetcher)
                if time.monotonic() - started_s > LIMIT_S:
                    faults.append(f"took {time.monotonic() - started_s:.0f} s")
                outcomes[outcome].append(str(path.resolve()))
                broken += [f"{path.resolve()} {options}: {fault}" for fault in faults]
    for outcome, paths in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        print(f"{len(paths):6} {outcome}; such as {paths[0]}")
    print(*broken, sep="\n", end="\n" if broken else "")
    print(f"{sum(map(len, outcomes.values()))} listings, {len(broken)} faults")
    sys.exit(bool(broken))


def find_inputs(roots: Iterator[Path], links: Path) -> Iterator[Path]:
    """Yield the files that can be INPUT; tables of another name are linked in `links` with the suffix of their kind."""
    for root in roots:
        for number, path in enumerate(sorted(root.rglob("*")) if root.is_dir() else [root]):
            if not path.is_file():
                continue
            if path.name.lower().endswith((*KINDS, *IMAGE_SUFFIXES)):
                yield path
            elif suffix := find_suffix(path):
                link = links / f"{root.name}-{number}{suffix}"
                link.symlink_to(path.resolve())
                yield link


def find_suffix(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(8)
    return next((suffix for magic, suffix in _CONTENTS.items() if start.startswith(magic)), None)


def choose_options(path: Path) -> Iterator[Options]:
    """Yield the options to list a file with: the defaults; for a table also each column as image, and all as kept."""
    yield {}
    for name in (names := read_columns(path))[:6]:
        yield {"image_column": name}
    if names:
        keep = [name for name in names if name not in schema.OUTPUT.names]
        yield {"image_column": "", "prompt_column": names[0], "keep_columns": tuple(keep[:20])}


def read_columns(path: Path) -> list[str]:
    open_table = {".parquet": get_processes().open_parquet, ".arrow": get_processes().open_arrow}.get(path.suffix)
    try:
        if open_table is None:
            return []
        with open_table(str(path)) as table:
            return [name for name in dict.fromkeys(table.schema.names) if name]
    except TableError:
        return []


def check_input(path: Path, options: Options, fetcher: Fetcher) -> tuple[str, list[str]]:
    """List one file and read its images. Return what came out, and the rules that it broke."""
    try:
        config = CaptionConfig(input=(str(path),), output="out", model="demo", **options)
        with list_rows(config, config.questionnaire) as listing:
            tables = [table.select(["id", "images", "error"]) for table in listing.read_tables()]
            rows = [row for table in tables for row in table.to_pylist()]
            faults = [f"{len(rows)} rows of {listing.num_rows}"] * (len(rows) != listing.num_rows)
    except SourceError as error:
        return f"refused: {shorten(error, path)}", find_faults([str(error)])
    except Exception as error:
        return "raised", [f"{type(error).__name__}: {error}"]
    messages = [row["error"] for row in rows if row["error"]]
    read = [read_row(row, fetcher) for row in rows[:MAX_READ] if not row["error"]]
    faults += [f"{len(rows)} rows have {len({row['id'] for row in rows})} ids"] * (
        len({row["id"] for row in rows}) != len(rows)
    )
    faults += find_faults([*messages, *filter(None, read)])
    first = next(iter([*messages, *filter(None, read)]), None)
    return f"listed{f', with: {shorten(first, path)}' if first else ''}", faults


def read_row(row: dict[str, Any], fetcher: Fetcher) -> str | None:
    """Read and decode the images of a row; return the message of its error, if any."""
    images = [parse_reference(image) for image in row["images"]]
    if is_seekable_video(images):
        return None
    try:
        for data in fetcher.submit(images).result():
            decode_image(data)
    except (OSError, MediaError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def find_faults(messages: list[str]) -> list[str]:
    """Return the messages that hold a trace, a line break or the name of an exception, or are empty or too long."""
    bad = [message for message in messages if _TRACE.search(message) or not 0 < len(message) < 1500]
    return [f"message: {message[:300]!r}" for message in bad[:1]]


def shorten(message: object, path: Path) -> str:
    """Return a message without the name of its file and numbers, so that equal reasons are counted together."""
    text = str(message).replace(str(path), "FILE").replace(os.fspath(path.parent), "DIRECTORY")
    return re.sub(r"\d[\d,]*", "N", re.sub(r"column .*? holds", "column X holds", text)).partition("; it has")[0][:130]


if __name__ == "__main__":
    main()
