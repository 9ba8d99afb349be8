"""Write JSON lines for tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def write_lines(path: Path, *objects: object) -> Path:
    lines = [o if isinstance(o, bytes) else json.dumps(o, ensure_ascii=False).encode() for o in objects]
    data = b"\n".join(lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
