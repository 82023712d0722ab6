"""What a server may not do: send without end, compress, or be asked again before it wants to be."""

import asyncio
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.errors import DataError
from cmae_scale.data.remote import Remote
from cmae_scale.data.remote_errors import read_wait, understand_error
from cmae_scale.data.storage import open_storage, read_text

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

ENDLESS_BYTES = 1 << 28  # what the server would send if nobody hung up
Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the test says."""

    server: "Server"

    def do_HEAD(self) -> None:
        self.send_response(200)
        if self.server.told_bytes is not None:
            self.send_header("Content-Length", str(self.server.told_bytes))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.answer(self)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """`sent` counts the bytes of bodies, `told_bytes` is the length that it tells."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = send_endlessly
        self.told_bytes: int | None = None
        self.sent = 0
        self.asked = 0
        self.url = f"http://127.0.0.1:{self.server_port}/a.json"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def send_endlessly(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while handler.server.sent < ENDLESS_BYTES:
            handler.server.sent += handler.wfile.write(bytes(1 << 16))
    except OSError:  # the client has hung up
        handler.close_connection = True


def send_compressed(handler: Handler) -> None:
    handler.send_response(206)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    handler.wfile.write(b"\x1f\x8b")


def open_remote(*, timeout_s: float = 30.0, retries: int = 1) -> Remote:
    return Remote("http", timeout_s=timeout_s, retries=retries, cache=None)


def test_a_server_that_sends_everything_where_a_range_was_asked_for_is_stopped(server: Server) -> None:
    server.told_bytes = ENDLESS_BYTES
    with (
        open_remote().open_file(server.url, max_bytes=ENDLESS_BYTES) as file,
        pytest.raises(DataError, match="whole files where a range was asked for"),
    ):
        file.read(100)
    assert server.sent < ENDLESS_BYTES // 4


def test_an_object_store_that_sends_everything_is_stopped_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs", reason="the extra `remote` is not installed")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.removesuffix("/a.json"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "stand-in")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.told_bytes = ENDLESS_BYTES
    remote = Remote("s3", timeout_s=30.0, retries=0, cache=None)
    with (
        remote.open_file("s3://bucket/a.json", max_bytes=ENDLESS_BYTES) as file,
        pytest.raises(DataError, match="whole files where a range was asked for"),
    ):
        file.read(100)
    assert server.sent < ENDLESS_BYTES // 4


def test_a_server_that_tells_no_length_may_send_what_the_index_says_and_no_more(server: Server) -> None:
    with (
        open_remote().open_file(server.url, max_bytes=5000) as file,
        pytest.raises(DataError, match="more than the 5000 bytes that can be"),
    ):
        file.read(100)
    assert server.sent < ENDLESS_BYTES // 4


def test_an_answer_that_is_compressed_is_refused(server: Server) -> None:
    server.told_bytes, server.answer = 1000, send_compressed
    with (
        open_remote().open_file(server.url, max_bytes=1000) as file,
        pytest.raises(DataError, match=r"it compresses what it sends.*asked 1 times"),
    ):
        file.read(100)


def test_a_server_that_asks_to_wait_is_left_alone_up_to_the_timeout(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            waited.append(seconds)
        await sleep(0)

    def ask_to_wait(handler: Handler) -> None:
        handler.server.asked += 1
        handler.send_response(429 if handler.server.asked == 1 else 503)
        handler.send_header("Retry-After", "3" if handler.server.asked == 1 else "86400")
        handler.end_headers()

    monkeypatch.setattr(asyncio, "sleep", note)
    server.told_bytes, server.answer = 1000, ask_to_wait
    with (
        open_remote(timeout_s=20.0, retries=2).open_file(server.url, max_bytes=1000) as file,
        pytest.raises(DataError, match="status 503"),
    ):
        file.read(100)
    assert waited == [3.0, 20.0]


NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0.0),
        ("-5", 0.0),
        ("9" * 5000, 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("Tue, 99 Foo 2030 00:00:00 GMT", 0.0),
    ],
)
def test_the_wait_is_read_from_seconds_and_dates_and_from_nothing_else(text: str, seconds: float) -> None:
    assert read_wait({"retry-AFTER": text}, now=NOW) == seconds


def test_the_wait_of_botocores_errors_is_read_too() -> None:
    error = OSError("slow down")
    error.response = {  # type: ignore[attr-defined]
        "ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "7"}}
    }
    failure = understand_error(error)
    assert (str(failure), failure.wait_s, failure.is_final) == ("OSError, status 503", 7.0, False)


def test_an_index_of_many_requests_is_read_whole(server: Server) -> None:
    text = json.dumps({"shards": ["x" * 100] * 60_000}).encode()

    def send_range(handler: Handler) -> None:
        first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        handler.send_response(206)
        handler.end_headers()
        handler.wfile.write(text[first : last + 1])

    server.told_bytes, server.answer = len(text), send_range
    assert read_text(open_storage(server.url, DataConfig(shards=server.url)), server.url) == text
