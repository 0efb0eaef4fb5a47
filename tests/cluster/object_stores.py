"""Servers of object stores, each in a process of its own, with a bucket named "bucket".

`make test-cluster` names in RAYBILEVEL_TEST_STORES the folder of their commands.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs

FOLDER = os.environ.get("RAYBILEVEL_TEST_STORES")
MISSING = (
    "RAYBILEVEL_TEST_STORES does not name a folder with moto_server and gcp-storage-emulator; make test-cluster does"
)
CREDENTIALS = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
"""Of the S3 server, for the environment; Google's is asked anonymously."""


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Its log is a file, as these servers write a line for each request."""
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


@contextmanager
def s3_server(address: str, log: Path) -> Iterator[int]:
    """The port of a server at this address."""
    with running([f"{FOLDER}/moto_server", "--host", address, "--port", "0"], log) as server:
        while (found := re.search(rf"{re.escape(address)}:(\d+)", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield int(found[1])


@contextmanager
def s3(log: Path) -> Iterator[str]:
    """The URI of a folder in an empty bucket of S3."""
    with s3_server("127.0.0.1", log) as port:
        options = f"scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1&allow_bucket_creation=true"
        filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket/?{options}")
        filesystem.create_dir("bucket")
        yield f"s3://bucket/run?{options}"


@contextmanager
def google(log: Path) -> Iterator[str]:
    """The URI of a folder in an empty bucket of Google Cloud Storage."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--default-bucket", "bucket", "--in-memory"]
    with running([f"{FOLDER}/gcp-storage-emulator", "start", *options], log) as server:
        while not answers(port):
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"gs://anonymous@bucket/run?scheme=http&endpoint_override=127.0.0.1:{port}"


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
