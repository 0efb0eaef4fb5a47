"""An S3 server in a process of its own, with a bucket named "bucket"."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = os.environ.get("RAYBILEVEL_TEST_S3")
CREDENTIALS = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")


@contextmanager
def s3_server(address: str, log: Path) -> Iterator[int]:
    """The port of a server at this address; its log is a file, as it writes a line for each request."""
    assert SERVER is not None
    with open(log, "w") as file:
        server = subprocess.Popen([SERVER, "--host", address, "--port", "0"], stdout=file, stderr=file)
    try:
        while (found := re.search(rf"{re.escape(address)}:(\d+)", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield int(found[1])
    finally:
        server.kill()
        server.wait()
