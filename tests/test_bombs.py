"""Small files that expand to huge ones become rows or error rows, in bounded memory and time.

tests/stress/bombs.py makes them. Those that take minutes to make or to read run with --run-slow (4 minutes).
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.stress.bombs import BOMBS
from tests.support.roots import ROOT

MAX_RSS_MB, MAX_S = 512, 200

OUTCOMES = {
    "png_of_a_billion_pixels": "error: too large",
    "png_with_packed_texts": "error: corrupt PNG",
    "png_with_a_packed_profile": "error: corrupt PNG",
    "jpeg_of_profiles_and_exif": "picture 8 x 8",
    "webp_of_many_frames": "picture 1000 x 1000",
    "webp_of_a_large_canvas": "error: too large",
    "gif_of_many_frames": "picture 300 x 300",
    "gz_of_zeros": "1 rows, 1 errors: the tar is damaged at byte 0",
    "gz_of_small_zeros": "rows, 1 errors: the tar is damaged",
    "line_of_a_gigabyte": "2 rows, 1 errors: line 1: longer than",
    "packed_line_of_many_gigabytes": "1 rows, 1 errors: line 1: longer than",
    "nested_json": "4 rows, 3 errors: line 4: nested more than 40 deep",
    "tar_of_a_million_members": "1000000 rows",
    "tar_of_long_names": "1 errors: the tar is damaged",
    "parquet_of_a_large_dictionary": "refused:",
    "parquet_of_a_large_kept_value": "refused:",
    "parquet_that_claims_a_large_page": "20 rows, 1 errors: row 0 of",
}
SLOW = {
    "gz_of_zeros",
    "gz_of_small_zeros",
    "line_of_a_gigabyte",
    "packed_line_of_many_gigabytes",
    "tar_of_a_million_members",
    "tar_of_long_names",
    "parquet_of_a_large_dictionary",
    "parquet_of_a_large_kept_value",
    "webp_of_many_frames",
    "webp_of_a_large_canvas",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in BOMBS]
)
def test_a_bomb_is_read_or_refused_within_memory_and_time(name: str) -> None:
    command = [sys.executable, "-m", "tests.stress.bombs", name]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-2000:]
    measured = json.loads(finished.stdout)
    assert OUTCOMES[name] in measured["outcome"], measured
    assert measured["rss_mb"] <= MAX_RSS_MB and measured["s"] <= MAX_S, measured
