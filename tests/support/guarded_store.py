"""An S3 server that checks credentials and permissions, as a real one does."""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

REGION = "us-east-1"


class GuardedStore:
    """A server at `endpoint` with `s3://guarded`; `admin` is a client that it obeys, whatever it checks."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.endpoint = "http://{}:{}".format(*self._server.get_host_and_port())
        self._iam = self._connect("iam", "admin", "secret")
        self.owner = self.create_user("owner", actions=["s3:*"])
        self._connect("s3", "admin", "secret").create_bucket(Bucket="guarded")
        self.files = self._connect("s3", *self.owner)

    def create_user(self, name: str, actions: list[str]) -> tuple[str, str]:
        """Return the id and the secret of a key that permits these actions."""
        self._iam.create_user(UserName=name)
        statement = {"Effect": "Allow", "Action": actions or ["sqs:*"], "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self._iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=policy)
        key = self._iam.create_access_key(UserName=name)["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    def read_all(self) -> dict[str, bytes]:
        """Return {key: content} of the bucket."""
        found = self.files.list_objects_v2(Bucket="guarded").get("Contents", [])
        return {o["Key"]: self.files.get_object(Bucket="guarded", Key=o["Key"])["Body"].read() for o in found}

    @contextmanager
    def check_access(self) -> Iterator[None]:
        """Check every request while in the context."""
        self._set_unchecked_requests("0")
        try:
            yield
        finally:
            self._set_unchecked_requests("inf")

    def close(self) -> None:
        self._server.stop()

    def _connect(self, service: str, key: str, secret: str) -> Any:
        options = {"aws_access_key_id": key, "aws_secret_access_key": secret, "region_name": REGION}
        return boto3.client(service, endpoint_url=self.endpoint, **options)

    def _set_unchecked_requests(self, count: str) -> None:
        headers = {"Content-Type": "text/plain"}  # by default the body would be read as a form
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", count.encode(), headers)
        urllib.request.urlopen(request).close()
