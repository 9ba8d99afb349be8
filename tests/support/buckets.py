"""Create an empty bucket in the S3 server that the environment names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from s3fs import S3FileSystem

BUCKET = "s3://bucket"


@contextmanager
def create_bucket() -> Iterator[S3FileSystem]:
    # fsspec caches its file systems together with the environment of their first use.
    S3FileSystem.clear_instance_cache()
    fs = fsspec.filesystem("s3")
    fs.call_s3("create_bucket", Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    yield fs
    fs.rm("bucket", recursive=True)
    S3FileSystem.clear_instance_cache()
