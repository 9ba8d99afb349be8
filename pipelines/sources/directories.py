"""Detect what a directory holds: images, shards or a Hugging Face dataset."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from ovis_model.wording import count_nouns
from pipelines.errors import SourceError
from pipelines.sources.companions import get_stem
from pipelines.sources.kinds import IMAGE_SUFFIXES, detect_kind
from pipelines.sources.selection import read_marker, select_files
from pipelines.storage import store
from pipelines.storage.store import FileInfo

_METADATA = "metadata.jsonl"
_UNREAD_METADATA = ("metadata.csv", "metadata.parquet")

logger = logging.getLogger(__name__)


def list_directory(uri: str, output: str | None = None) -> Iterable[FileInfo]:
    """Return the files of an INPUT that is a directory. Raise SourceError if the choice is ambiguous.

    Hidden files and the files of runs are left out; `output` is the OUTPUT of this run.
    """
    if saved := _find_saved_dataset(uri):
        return saved
    infos = select_files(uri, store.list_files(uri), output)
    images = [info for info in infos if PurePosixPath(info.uri).suffix.lower() in IMAGE_SUFFIXES]
    if any(info.uri.rpartition("/")[2] in (_METADATA, *_UNREAD_METADATA) for info in infos) and images:
        return _list_image_folder(uri, infos, images)
    chosen = images or _select_shards(uri, infos)
    skipped = {info.uri for info in infos}.difference(info.uri for info in chosen)
    log_skipped(uri, Counter(PurePosixPath(other).suffix.lower() or "no suffix" for other in skipped))
    return chosen


def _find_saved_dataset(uri: str) -> list[FileInfo]:
    """Return the shards that `Dataset.save_to_disk` wrote, of all splits of a `DatasetDict`; [] if `uri` is neither."""
    splits = read_marker(uri, "dataset_dict.json").get("splits")
    if isinstance(splits, list):
        return [info for split in splits for info in _find_saved_dataset(store.join(uri, str(split)))]
    files = read_marker(uri, "state.json").get("_data_files")
    if not isinstance(files, list):
        return []
    return [_find_shard(store.join(uri, str(file["filename"]))) for file in files]


def _find_shard(uri: str) -> FileInfo:
    info = store.find_file(uri)
    if info is None:
        raise SourceError(f"{store.redact(uri)} is missing: the dataset was saved or copied only in part")
    return info


def _list_image_folder(uri: str, infos: list[FileInfo], images: list[FileInfo]) -> list[FileInfo]:
    """Replace the images below each directory that has a `metadata.jsonl` by that file."""
    if unread := [info.uri for info in infos if info.uri.rpartition("/")[2] in _UNREAD_METADATA]:
        raise SourceError(
            f"{unread[0]} is not supported; convert it to {_METADATA}, or use {uri}/** to caption only the images"
        )
    metadata = [info for info in infos if info.uri.rpartition("/")[2] == _METADATA]
    described = tuple(info.uri.removesuffix(_METADATA) for info in metadata)
    others = [info for info in images if not info.uri.startswith(described)]
    listed = count_nouns(len(images) - len(others), "image is listed", "images are listed")
    logger.warning("%s: %s through the rows of %s", store.redact(uri), listed, _METADATA)
    return sorted([*metadata, *others], key=lambda info: info.uri)


def _select_shards(uri: str, infos: list[FileInfo]) -> list[FileInfo]:
    """Return the shards of a directory without images. Raise SourceError if they are of several kinds."""
    shards = [info for info in infos if detect_kind(info.uri) != "file"]
    if any(detect_kind(info.uri) != "json" for info in shards):  # a .json next to other shards describes them
        shards = [info for info in shards if detect_kind(info.uri) != "json"]
    shards = _remove_companions(uri, shards)
    kinds = sorted({detect_kind(info.uri).replace("tgz", "tar") for info in shards})
    if len(kinds) > 1:
        raise SourceError(
            f"{store.redact(uri)} holds no images but shards of several kinds ({', '.join(kinds)}); choose one kind "
            f"with a glob such as {uri.rstrip('/')}/**/*.{kinds[0]}"
        )
    return shards


def _remove_companions(uri: str, shards: list[FileInfo]) -> list[FileInfo]:
    """Leave out the Parquet files with the name of a tar next to them; log how many there are."""
    stems = {get_stem(info.uri) for info in shards}
    others = [i for i in shards if detect_kind(i.uri) != "parquet" or i.uri.removesuffix(".parquet") not in stems]
    if count := len(shards) - len(others):
        tables = count_nouns(count, "Parquet file")
        logger.warning("%s: only columns are read from %s with the name of a tar", store.redact(uri), tables)
    return others


def log_skipped(uri: str, others: Counter[str]) -> None:
    """Log how many files were skipped; `others` counts them by suffix."""
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logger.warning("%s: skipped %s (%s)", store.redact(uri), count_nouns(others.total(), "file"), counts)
