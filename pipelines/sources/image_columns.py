"""Choose the column or field that holds the images by its name, in the same way for every source."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

# Upper and lower case are the same. A line ranks above the lines below it. Of two names in one line neither does, as
# they may hold different images.
_NAMES_BY_RANK = """
image images img imgs picture pictures pic pics photo photos
video videos
uri image_uri image_url image_urls image_path image_paths image_file image_files image_link img_url img_path imageurl
file_name filename image_name image_filename image_file_name video_path video_url video_uri video_file
url urls path paths file files filepath file_path link
jpg jpeg png webp gif bmp tif tiff mp4
"""
_RANKS = {name: rank for rank, line in enumerate(_NAMES_BY_RANK.strip().splitlines()) for name in line.split()}


def choose_image_columns(row: Mapping[str, Any]) -> list[str]:
    """Return the columns with the highest rank that have a value: none, one, or several that are ambiguous.

    row: {column: value}; of a table, whose columns have types, {column: True}.
    """
    found = [(rank, name) for rank, name in _rank_columns(tuple(row)) if row[name]]
    return [name for rank, name in found if rank == found[0][0]] if len(found) != 1 else [found[0][1]]


@lru_cache(1024)
def _rank_columns(names: tuple[str, ...]) -> list[tuple[int, str]]:
    return sorted((_RANKS[name.lower()], name) for name in names if name.lower() in _RANKS)
