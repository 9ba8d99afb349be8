"""Write WebDataset shards for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, mode: str = "w", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path
