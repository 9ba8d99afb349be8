"""Feed small files that expand enormously to the real readers and measure: `python -m tests.stress.bombs NAME`.

Prints a line of JSON with the outcome, the peak memory and the seconds that it took.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.config import CaptionConfig
from pipelines.errors import MediaError, SourceError
from pipelines.media.fetch import Fetcher
from pipelines.media.images import decode_image
from pipelines.media.reference import parse_reference
from pipelines.sources import list_rows

Lines = list[str]


def main() -> None:
    name = sys.argv[1]
    if len(sys.argv) == 3:
        print(BOMBS[name](Path(sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as directory:
        # The file is made in a separate process, whose memory is not counted.
        make = [sys.executable, "-m", "tests.stress.bombs", name, directory]
        path = Path(subprocess.run(make, check=True, capture_output=True, text=True).stdout.strip())
        started_s = time.monotonic()
        outcome = _decode(path) if path.suffix in (".png", ".webp", ".gif", ".jpg") else _read_shard(path)
        seconds = time.monotonic() - started_s
    print(json.dumps({"name": name, "outcome": outcome, "rss_mb": round(_read_peak_mb()), "s": round(seconds, 2)}))


def _read_peak_mb() -> float:
    """Return this program's peak memory; getrusage also counts memory from before exec, the whole test process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def _decode(path: Path) -> str:
    try:
        return "picture {} x {}".format(*decode_image(path.read_bytes()).size)
    except MediaError as error:
        return f"error: {error}"


def _read_shard(path: Path) -> str:
    """Return the number of rows and of errors, and one of the errors."""
    keep = ("note",) if "kept" in path.name else ()
    config = CaptionConfig(input=(str(path),), output="out", model="demo", keep_columns=keep)
    try:
        with list_rows(config, config.questionnaire) as listing:
            errors = [error for table in listing.read_tables() for error in table.column("error").to_pylist() if error]
            first = next(listing.read_tables()).slice(0, 1).to_pylist()[0]
            num_rows = listing.num_rows
    except SourceError as error:
        return f"refused: {error}"
    if not errors:
        errors = _find_fault(first["images"])
    return f"{num_rows} rows, {len(errors)} errors: {(errors or ['none'])[-1]}"


def _find_fault(images: list[dict[str, object]]) -> Lines:
    try:
        Fetcher().submit([parse_reference(image) for image in images]).result()  # type: ignore[arg-type]
    except OSError as error:
        return [str(error)]
    return []


def png_of_a_billion_pixels(directory: Path) -> Path:
    pixels = zlib.compressobj(9)
    body = b"".join(pixels.compress(bytes(1 << 20)) for _ in range(130)) + pixels.flush()
    return _write(directory / "a.png", _make_png(32768, 32768, 1, (b"IDAT", body)))


def png_with_packed_texts(directory: Path) -> Path:
    """Write a PNG with 300 chunks of text, each of which unpacks to 100 MB."""
    text = zlib.compress(bytes(100 << 20), 9)
    chunks = [(b"zTXt", b"a\0\0" + text), (b"iTXt", b"b\0\1\0\0\0" + text)] * 150
    return _write(directory / "a.png", _make_png(8, 8, 8, *chunks, (b"IDAT", zlib.compress(bytes(72)))))


def png_with_a_packed_profile(directory: Path) -> Path:
    profile = b"icc\0\0" + zlib.compress(bytes(1 << 30), 9)
    return _write(directory / "a.png", _make_png(8, 8, 8, (b"iCCP", profile), (b"IDAT", zlib.compress(bytes(72)))))


def jpeg_of_profiles_and_exif(directory: Path) -> Path:
    """Write 60 MB of metadata before a small picture."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    exif = _make_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + b"\xff" * 65000)
    profiles = b"".join(_make_segment(0xE2, b"ICC_PROFILE\0" + bytes((i, 255)) + bytes(65000)) for i in range(1, 256))
    return _write(directory / "a.jpg", b"\xff\xd8" + exif + profiles * 4 + file.getvalue()[2:])


def webp_of_many_frames(directory: Path) -> Path:
    """Write 100,000 frames on a canvas of 1,000 x 1,000 px."""
    still = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(still, "WEBP", lossless=True)
    image = still.getvalue()[12:]
    place = struct.pack("<I", 999)[:3]
    frame = bytes(6) + place + place + struct.pack("<I", 10)[:3] + b"\0" + image
    frames = (b"ANMF" + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)) * 100_000
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + place + place
    body = b"WEBP" + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frames
    return _write(directory / "a.webp", b"RIFF" + struct.pack("<I", len(body)) + body)


def webp_of_a_large_canvas(directory: Path) -> Path:
    """Write an animation on the largest canvas whose frames are one pixel."""
    still = io.BytesIO()
    Image.new("RGB", (1, 1)).save(still, "WEBP", lossless=True)
    frame = bytes(6) + bytes(6) + struct.pack("<I", 10)[:3] + b"\0" + still.getvalue()[12:]
    side = struct.pack("<I", 13_300)[:3]
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + side + side
    frames = b"ANMF" + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)
    body = b"WEBP" + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frames * 2
    return _write(directory / "a.webp", b"RIFF" + struct.pack("<I", len(body)) + body)


def gif_of_many_frames(directory: Path) -> Path:
    file = io.BytesIO()
    Image.new("P", (300, 300)).save(file, "GIF")
    data = file.getvalue()
    at = data.index(b"\x2c\0\0\0\0")
    return _write(directory / "a.gif", data[:at] + data[at:-1] * 100_000 + b"\x3b")


def gz_of_zeros(directory: Path) -> Path:
    """Write a tar.gz of 20 MB with a member of 20 GB."""
    info = tarfile.TarInfo("1.jpg")
    info.size = 20 << 30
    return _write_gzip(directory / "a.tar.gz", [info.tobuf()], 20 << 10)


def gz_of_small_zeros(directory: Path) -> Path:
    """Write a tar.gz with 3,000 members of 1 MB each, so that no single header looks suspicious."""
    info = tarfile.TarInfo("1.jpg")
    info.size = 1 << 20
    return _write_gzip(directory / "a.tar.gz", [info.tobuf() + bytes(1 << 20)] * 3000, 0)


def line_of_a_gigabyte(directory: Path) -> Path:
    path = directory / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"image": "')
        for _ in range(1 << 10):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"image": "b.jpg"}\n')
    return path


def packed_line_of_many_gigabytes(directory: Path) -> Path:
    return _write_gzip(directory / "a.jsonl.gz", [b'{"image": "'], 4 << 10)


def nested_json(directory: Path) -> Path:
    lines = [
        '{"note": "x", "image": "a.jpg"}',
        '{"image": ' * 1_000_000,
        "[" * 5_000_000,
        '{"image": "a.jpg", "note": ' + "[" * 500 + "]" * 500 + "}",
    ]
    return _write(directory / "a.kept.jsonl", "\n".join(lines).encode())


def tar_of_a_million_members(directory: Path) -> Path:
    path = directory / "a.tar"
    with path.open("wb") as file:
        for i in range(1_000_000):
            file.write(tarfile.TarInfo(f"folder/{i:07}.jpg").tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(10240))
    return path


def tar_of_long_names(directory: Path) -> Path:
    """Write headers that compress well but whose long names are kept in memory."""
    headers = (tarfile.TarInfo(f"{i:06}" + "n" * 4000 + ".jpg").tobuf(tarfile.GNU_FORMAT) for i in range(100_000))
    return _write_gzip(directory / "a.tgz", [b"".join(headers)], 0)


def parquet_of_a_large_dictionary(directory: Path) -> Path:
    """Write one value of 1 GB in a file of 1 MB."""
    return _write_parquet(directory / "a.parquet", {"image": pa.array([bytes(1 << 30)] * 2)})


def parquet_of_a_large_kept_value(directory: Path) -> Path:
    columns = {"image": [b"1"] * 2, "note": pa.array(["x" * (1 << 30)] * 2)}
    return _write_parquet(directory / "a.kept.parquet", columns)


def parquet_that_claims_a_large_page(directory: Path) -> Path:
    """Write a page header that claims 2 GB for a few bytes."""
    path = _write_parquet(directory / "a.parquet", {"image": pa.array([b"x" * 5000] * 20)}, use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    size = data.index(b"\x15", at + 1) + 1  # thrift: field 2, a zigzag number, is the unpacked size
    data[size : size + 3] = b"\xfe\xff\x7f"
    return _write(path, bytes(data))


def _write_parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, compression="zstd", **options)
    return path


def _write_gzip(path: Path, pieces: Lines | list[bytes], num_mb: int) -> Path:
    """Write the pieces and `num_mb` MB of zeros, compressed with gzip."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for piece in [*pieces, *[bytes(1 << 20)] * num_mb]:
            file.write(piece)  # type: ignore[arg-type]
    return path


def _make_png(width: int, height: int, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    parts = (struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in every)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _make_segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BOMBS: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (
        png_of_a_billion_pixels,
        png_with_packed_texts,
        png_with_a_packed_profile,
        jpeg_of_profiles_and_exif,
        webp_of_many_frames,
        webp_of_a_large_canvas,
        gif_of_many_frames,
        gz_of_zeros,
        gz_of_small_zeros,
        line_of_a_gigabyte,
        packed_line_of_many_gigabytes,
        nested_json,
        tar_of_a_million_members,
        tar_of_long_names,
        parquet_of_a_large_dictionary,
        parquet_of_a_large_kept_value,
        parquet_that_claims_a_large_page,
    )
}

if __name__ == "__main__":
    main()
