"""Shards over a network that fails: the same batches, or one clear sentence, and never a secret in it."""

import contextlib
import http.server
import logging
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data import remote
from cmae_scale.data.cache import ChunkCache
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.mix import plan_data
from cmae_scale.data.shard_set import ShardSet, open_shards
from cmae_scale.data.storage import open_storage
from cmae_scale.data.stream import CropBatch, open_batches

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

VIEWS = ViewsConfig(img_px=16, master_px=20, shift_px=4)
Fault = Callable[["Handler"], bool]  # does something else instead of answering, or says False


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ranges of the files of a folder, after a fault of the test's choice."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, folder: Path, server_faults: "Server") -> None:
        self.folder, self.faults = folder, server_faults
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.faults.requests.append((self.path, self.headers.get("Range"), dict(self.headers)))
        if self.faults.fault(self):
            return
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.faults.sent += len(content)
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Server:
    """A web server on this machine. `fault` decides what goes wrong with a request."""

    def __init__(self, folder: Path) -> None:
        self.fault: Fault = lambda _: False
        self.requests: list[tuple[str, str | None, dict[str, str]]] = []
        self.sent = 0
        self.closed = threading.Event()
        handler = partial(Handler, folder=folder, server_faults=self)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.closed.set()
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


def settings(location: str | Path, **others: Any) -> DataConfig:
    return DataConfig.model_validate({"shards": str(location), "shuffle_window": 4, "workers": 2, **others})


def open_set(location: str | Path, **others: Any) -> ShardSet:
    return open_shards(str(location), data=settings(location, **others))


def read_batches(shards: ShardSet, data: DataConfig, *, first_step: int = 0) -> list[CropBatch]:
    plan = plan_data(shards, data, global_batch=12, seed=5)
    stream = open_batches(
        shards,
        plan,
        views=VIEWS,
        data=data,
        rank=0,
        ranks=1,
        accumulation=1,
        first_step=first_step,
        end_step=2 * plan.steps_per_epoch,
        pin=False,
        bad=BadSamples(1.0),
    )
    with stream:
        return list(stream)


def assert_same(batches: list[CropBatch], expected: list[CropBatch]) -> None:
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, expected, strict=True))


def fail_with_status(handler: Handler) -> bool:
    handler.send_response(503)
    handler.send_header("Content-Length", "0")
    handler.end_headers()
    return True


def hang_up(handler: Handler) -> bool:
    handler.close_connection = True
    return True


def stop_in_the_middle(handler: Handler) -> bool:
    if handler.headers.get("Range") is None:
        return False
    handler.send_response(206)
    handler.send_header("Content-Length", "4000")
    handler.end_headers()
    handler.wfile.write(b"x" * 1000)
    return hang_up(handler)


def come_short(handler: Handler) -> bool:
    if handler.headers.get("Range") is None:
        return False
    handler.send_response(206)
    handler.send_header("Content-Length", "10")
    handler.end_headers()
    handler.wfile.write(b"y" * 10)
    return True


def stall(handler: Handler) -> bool:
    handler.faults.closed.wait()
    return hang_up(handler)


FAULTS = [fail_with_status, hang_up, stop_in_the_middle, come_short]


def test_a_server_that_fails_one_request_in_five_gives_the_same_batches(make_folder, server: Server) -> None:
    folder = make_folder("a", (7, 13, 1, 20, 9))
    rng = random.Random(3)
    server.fault = lambda handler: rng.random() < 0.2 and rng.choice(FAULTS)(handler)
    over_http = read_batches(open_set(f"{server.url}/a"), settings(server.url))
    assert_same(over_http, read_batches(open_set(folder), settings(folder)))
    assert len(server.requests) > 30


def test_a_stalled_request_is_given_up_and_made_again(make_folder, server: Server) -> None:
    folder = make_folder("a", (20, 20))
    shards = open_set(f"{server.url}/a", read_timeout_s=1.0)
    expected = read_batches(open_set(folder), settings(folder))
    server.fault = lambda handler: len(server.requests) in (9, 12) and stall(handler)
    assert_same(read_batches(shards, settings(server.url)), expected)


def test_a_server_that_stalls_for_good_ends_in_a_clear_error(make_folder, server: Server) -> None:
    make_folder("a", (4,))
    server.fault = stall
    with pytest.raises(
        DataError, match=r"a/index\.json cannot be read: nothing came for 0\.1 s \(asked 3 times\)"
    ):
        open_set(f"{server.url}/a", read_timeout_s=0.1, read_retries=2)


def test_a_server_that_stops_in_the_middle_of_a_shard_ends_the_stream_at_that_batch(
    make_folder, server: Server
) -> None:
    make_folder("a", (12, 12, 12), side=40)
    data = settings(server.url, read_retries=1, streams=1)
    shards = open_set(f"{server.url}/a", read_retries=1)
    before = threading.active_count()
    plan = plan_data(shards, data, global_batch=2, seed=5)
    stream = open_batches(
        shards, plan, views=VIEWS, data=data, rank=0, ranks=1, accumulation=1, first_step=0, end_step=99,
        pin=False, bad=BadSamples(1.0),
    )  # fmt: skip
    with stream:
        next(stream)
        server.fault = stop_in_the_middle
        with pytest.raises(DataError, match=r"shard-0000\d\.tar cannot be read"):
            list(stream)
    assert threading.active_count() <= before + 1  # fsspec's own loop stays


def test_what_is_not_there_is_said_at_once(make_folder, server: Server) -> None:
    folder = make_folder("a", (2, 3))
    with pytest.raises(DataError, match=r"/b holds no index\.json"):
        open_set(f"{server.url}/b")
    (folder / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"a/shard-00001\.tar is missing"):
        open_set(f"{server.url}/a")
    assert len(server.requests) < 8, "a missing file is not asked for again and again"


def test_a_page_instead_of_a_shard_is_noticed_by_its_size(make_folder, server: Server) -> None:
    folder = make_folder("a", (2, 3))
    (folder / "shard-00001.tar").write_text("<html>please sign in</html>")
    with pytest.raises(DataError, match=r"shard-00001\.tar has 27 bytes, index\.json says"):
        open_set(f"{server.url}/a")


def test_a_server_without_ranges_is_named(
    make_folder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder("a", (20,))
    shards = open_set(f"{server.url}/a")

    def ignore_range(handler: Handler) -> bool:
        del handler.headers["Range"]
        return False

    server.fault = ignore_range
    monkeypatch.setattr(remote, "CHUNK_BYTES", 4096)
    with pytest.raises(DataError, match="sends whole files where a range was asked for"):
        list(shards.shards[0].read(9, 1))


@pytest.mark.parametrize("fault", [fail_with_status, hang_up, stop_in_the_middle])
def test_no_message_and_no_log_holds_a_secret(
    make_folder, server: Server, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder("a", (4,))
    address = server.url.replace("//", "//anna:s3cret@") + "/a?sig=t0ken"
    shards = open_set(address, read_retries=1)
    assert server.requests[-1][0] == "/a/shard-00000.tar?sig=t0ken"
    assert server.requests[-1][2]["Authorization"].startswith("Basic ")
    server.fault = fault
    with caplog.at_level(logging.INFO), pytest.raises(DataError) as error:
        list(shards.shards[0].read(0, 4))
    chain = f"{error.value!r} {error.value.__cause__!r} {caplog.text} {shards.shards[0].name}"
    assert "s3cret" not in chain
    assert "t0ken" not in chain
    assert "/a/shard-00000.tar" in str(error.value)


def test_beginning_inside_of_a_shard_asks_for_no_byte_before(make_folder, server: Server) -> None:
    from cmae_scale.data.offsets import write_offsets
    from cmae_scale.data.tar import find_offsets

    folder = make_folder("a", (40,), side=64)
    with (folder / "shard-00000.tar").open("rb") as file:
        offsets = find_offsets(file, name="a")
    shard = open_set(f"{server.url}/a").shards[0]
    write_offsets(folder / shard.info.name, offsets, sha256=shard.info.sha256)
    server.requests.clear()
    assert [sample.key for sample in shard.read(30, 2)] == ["000000030", "000000031"]
    ranges = [asked for path, asked, _ in server.requests if path.endswith(".tar") and asked]
    assert ranges == [f"bytes={offsets[30]}-{offsets[32] - 1}"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote.PACKAGES, "gs", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install fsspec no_such_package.*cmae-scale\[remote\]"):
        open_set("gs://bucket/train")


@contextlib.contextmanager
def s3_stand_in() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="the extra `remote` is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


def test_an_object_store_gives_the_same_batches(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("a", (7, 13, 20))
    with s3_stand_in() as url:
        for name, value in (
            ("AWS_ENDPOINT_URL", url),
            ("AWS_ACCESS_KEY_ID", "stand-in"),
            ("AWS_SECRET_ACCESS_KEY", "hidden-words"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for path in folder.iterdir():
            client.upload_file(str(path), "images", f"sets/a/{path.name}")
        expected = read_batches(open_set(folder), settings(folder))
        for location in (
            "s3://images/sets/a",
            "s3://images/se*/a",
            "s3://images/sets/a/shard-{00000..00002}.tar",
        ):
            assert_same(read_batches(open_set(location), settings(location)), expected)
        with pytest.raises(DataError, match=r"s3://images/sets/b holds no index\.json") as error:
            open_set("s3://images/sets/b")
        assert "hidden-words" not in f"{error.value!r} {error.value.__cause__!r}"
        client.delete_object(Bucket="images", Key="sets/a/shard-00001.tar")
        with pytest.raises(DataError, match=r"s3://images/sets/a/shard-00001\.tar is missing"):
            open_set("s3://images/sets/a")


def test_a_cache_serves_what_was_read_and_stays_within_its_size(
    make_folder, server: Server, tmp_path: Path
) -> None:
    folder = make_folder("a", (20, 20, 20), side=40)
    data = settings(server.url, cache=str(tmp_path / "cache"), cache_gib=1.0)
    expected = read_batches(open_set(folder), settings(folder))

    def read() -> list[CropBatch]:
        return read_batches(open_shards(f"{server.url}/a", data=data), data)

    assert_same(read(), expected)
    sent = server.sent
    assert_same(read(), expected)
    assert server.sent - sent < 4000, "only the index is read again"
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "lock"]
    assert sum(path.stat().st_size for path in kept) == sum(
        path.stat().st_size for path in folder.glob("*.tar")
    )


def test_two_addresses_with_one_file_name_do_not_meet_in_the_cache(
    make_folder, server: Server, tmp_path: Path
) -> None:
    """Also when the second has the same address, because the shards were made anew."""
    first, second = make_folder("x/a", (5,)), make_folder("y/a", (5,), bad=(0, 1))
    cache = str(tmp_path / "cache")

    def images(name: str) -> list[bytes]:
        return [
            sample.image for sample in open_set(f"{server.url}/{name}/a", cache=cache).shards[0].read(0, 5)
        ]

    ours, others = images("x"), images("y")
    assert ours != others
    shutil.copytree(second, first, dirs_exist_ok=True)
    assert images("x") == others


def test_the_least_recently_used_ranges_go_first(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=10_000)
    for number in range(40):
        cache.write(f"s3://b/{number}", 0, bytes(1000))
        time.sleep(0.002)
        assert cache.read("s3://b/0", 0, 1000) is not None, "in use all the time"
    kept = [number for number in range(40) if cache.read(f"s3://b/{number}", 0, 1000) is not None]
    assert kept[0] == 0
    assert kept[1:] == list(range(40 - len(kept) + 1, 40))
    assert 7 <= len(kept) <= 10


def test_a_cache_that_cannot_be_written_is_said_once_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = ChunkCache(tmp_path / "file", max_bytes=10_000)
    for number in range(3):
        cache.write("s3://b/x", number, b"1")
    assert cache.read("s3://b/x", 0, 1) is None
    assert [record.getMessage()[:20] for record in caplog.records] == [f"the cache in {tmp_path}"[:20]]


def test_a_torn_file_of_the_cache_is_not_used(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=10_000)
    cache.write("s3://b/x", 0, b"12345")
    cache.path("s3://b/x", 0).write_bytes(b"12")
    assert cache.read("s3://b/x", 0, 5) is None
    assert not list(tmp_path.rglob("*.part"))


def test_commands_run_only_when_allowed_and_without_a_shell(make_folder, tmp_path: Path) -> None:
    folder = make_folder("a", (7, 13))
    location = f"pipe:cat {folder}/{{name}}"
    with pytest.raises(ConfigError, match=r"pipe:cat \*+ would run a command.*allow_commands"):
        open_set(location)
    allowed = open_set(location, allow_commands=True)
    expected = read_batches(open_set(folder), settings(folder))
    assert_same(read_batches(allowed, settings(folder)), expected)
    trap = tmp_path / "trap"
    with pytest.raises(DataError, match=r"holds no index|cannot be read"):
        open_set(f"pipe:cat {{name}};touch {trap} $(touch {trap})", allow_commands=True)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sh -c 'head -c 5000 {name}; exit 3'", "the command ended with status 3"),
        ("sh -c 'head -c 5000 {name}; sleep 60'", r"no output for 0\.3 s"),
        ("head -c 5000 {name}", "without an end-of-archive mark|inside of a member"),
        ("no_such_program {name}", "No such file"),
        ("sh -c 'cat {name}; cat /dev/zero'", "the command writes more than the [0-9]+ bytes that can be"),
    ],
)
def test_a_command_that_fails_stalls_or_stops_is_damage(
    make_folder, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    import dataclasses

    folder = make_folder("a", (9,))
    monkeypatch.chdir(folder)
    location = f"pipe:{command}"
    storage = open_storage(location, settings(location, allow_commands=True, read_timeout_s=0.3))
    shard = dataclasses.replace(open_set(folder).shards[0], folder=location, storage=storage)
    with pytest.raises(DataError, match=message):
        list(shard.read(0, 9))
