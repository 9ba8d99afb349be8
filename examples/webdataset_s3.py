"""Caption WebDataset shards in an object store, from S3 to S3.

    .venv/bin/pip install --constraint constraints.txt s3fs    # `make test` has installed it
    export AWS_ENDPOINT_URL=https://minio.example              # omit for AWS itself
    export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_DEFAULT_REGION=...
    python examples/webdataset_s3.py s3://BUCKET/PREFIX [MODEL]

Uploads two shards of drawn images to PREFIX/shards and captions them into PREFIX/captions. The bucket must exist. On
a cluster each node needs the same environment.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile

import fsspec

from demo.drawings import make_picture
from pipelines.config import CaptionConfig
from pipelines.output.sink import read_results
from pipelines.pipeline import run_pipeline

IMAGES_PER_SHARD = 4


def caption_shards(prefix: str, model: str = "demo") -> None:
    """Upload the shards, caption them, and print each caption next to what was drawn."""
    for shard in range(2):
        with fsspec.open(f"{prefix}/shards/{shard:05}.tar", "wb") as file:
            file.write(make_shard(range(shard * IMAGES_PER_SHARD, (shard + 1) * IMAGES_PER_SHARD)))

    config = CaptionConfig(
        input=(f"{prefix}/shards/*.tar",),
        output=f"{prefix}/captions",
        model=model,
        keep_columns=("drawn",),  # a field of the .json members, copied into the output
        max_new_tokens=64,
    )
    print(run_pipeline(config))
    for row in read_results(config.output).to_pylist():
        print(f"{row['id']}\n  caption  {row['text']}\n  drawn    {row['drawn']}")


def make_shard(seeds: range) -> bytes:
    """Return a tar in which members of the same key are one row: KEY.png and KEY.json."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for seed in seeds:
            image, scene = make_picture(seed, held_out=True)  # never trained on
            png = io.BytesIO()
            image.save(png, "PNG")
            add_member(tar, f"{seed:06}.png", png.getvalue())
            add_member(tar, f"{seed:06}.json", json.dumps({"drawn": scene.caption}).encode())
    return buffer.getvalue()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    caption_shards(*sys.argv[1:])
