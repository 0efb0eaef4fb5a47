"""The page of a run over HTTP on this machine, made anew when the run has gone on."""

from __future__ import annotations

import threading
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from raybilevel._records.names import RECORDS_FOLDER, SEARCH_STATE, SUMMARY_FILE, TUNE_FOLDER
from raybilevel.errors import RaybilevelError
from raybilevel.report._page import drawing, render, sections_of
from raybilevel.report._sources import check, read_folder

LOOPBACK = "127.0.0.1"
WRITTEN = (f"{TUNE_FOLDER}/{SEARCH_STATE}*", f"{SEARCH_STATE}*", SUMMARY_FILE, f"{RECORDS_FOLDER}/*/*.json")
"""Files that say that a run has gone on."""
WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5">
<meta name="color-scheme" content="light dark"><title>raybilevel</title></head>
<body><p>{}</p><p>This page looks again every five seconds.</p></body></html>"""


class LivePage:
    """The page of a folder, which is made at most once for each state of its run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drawing = drawing()
        self._made: tuple[str, str] | None = None
        self._lock = threading.Lock()

    def stamp(self) -> str:
        """Another text whenever the run has written something."""
        newest = (path.stat().st_mtime_ns for pattern in WRITTEN for path in self.folder.glob(pattern))
        return str(max(newest, default=0))

    def html(self) -> str:
        """The page as it is now, or what there is to wait for."""
        with self._lock:
            stamp = self.stamp()
            if self._made is None or self._made[0] != stamp:
                self._made = stamp, self._make(stamp)
            return self._made[1]

    def _make(self, stamp: str) -> str:
        try:
            source = read_folder(self.folder)
            check(source)
        except RaybilevelError as error:
            return WAITING.format(escape(str(error)))
        return render(source, sections_of(source), self._drawing, stamp)


class Server(ThreadingHTTPServer):
    """Serves a page on loopback; port 0 takes a free one. `serve_forever` runs it.

    Raises:
        ConfigError: the packages of the extra `report` are missing.
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.page = LivePage(folder)
        super().__init__((LOOPBACK, port), Handler)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # A page of elsewhere whose name leads to loopback must not read this one.
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (LOOPBACK, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send(self.server.page.html(), "text/html")
        elif self.path == "/stamp":
            self._send(self.server.page.stamp(), "text/plain")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the browser asks every five seconds."""
