"""The page of a run that is served while the run goes on."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.suite import MethodEntry, ProblemEntry, Run, execute
from raybilevel import cli
from raybilevel._records import store as records
from raybilevel.errors import ConfigError, DataError

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from raybilevel.report._watch import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return str(answer.read().decode())


def test_the_page_follows_the_run(server: Server, tmp_path: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert "neither the folder of a comparison" in get(server.url)
    before = get(f"{server.url}stamp")
    entry = ProblemEntry(problem="ridge", options={"groups": 1})
    run = Run("ridge-1", entry, "random", MethodEntry(method="random"), 0, 2.0, (), None)
    record = execute(run)
    records.write(tmp_path / run.path, record)
    stamp = get(f"{server.url}stamp")
    page = get(server.url)
    assert stamp != before
    assert f'found !== "{stamp}"' in page and "All 2 observations" in page
    assert get(server.url) is not page and server.page.html() is server.page.html()  # made once for each state
    records.write(tmp_path / run.path, record.model_copy(update={"observations": record.observations[:1]}))
    os.utime(tmp_path / run.path, ns=(int(stamp) + 1, int(stamp) + 1))
    assert "All 1 observations" in get(server.url)


def test_nothing_else_is_served(server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{server.url}secret.txt")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(server.url, Host="elsewhere.example:80")


def test_what_cannot_be_watched_is_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        cli.watch(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"--port {server.server_port}: .*; name another one"):
        cli.watch(tmp_path, port=server.server_port)
