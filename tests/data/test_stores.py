"""gs:// and hf:// through the libraries that people use, against stand-ins for the stores on this machine."""

import http.server
import itertools
import json
import logging
import re
import subprocess
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data import remote
from cmae_scale.data.index import read_index
from cmae_scale.data.offsets import write_offsets
from cmae_scale.data.shard_set import open_shards
from cmae_scale.data.tar import find_offsets

BUCKET = "images"
DATA_SET = "someone/pictures"
TOKEN = "hf_aVerySecretToken"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Store:
    """A folder's files behind a port of this machine. `status` says how the next request fails, if so."""

    def __init__(self, root: Path, answer: Callable[["Request", "Store"], None]) -> None:
        self.root = root
        self.status: Callable[[], int | None] = lambda: None
        self.failures = 0
        self.authorizations: set[str | None] = set()
        self.ranges: list[tuple[int, int]] = []
        store = self

        class Handler(Request):
            def serve(self) -> None:
                store.authorizations.add(self.headers.get("Authorization"))
                if (status := store.status()) is not None:
                    store.failures += 1
                    self.reply(status, b"not now")
                    return
                answer(self, store)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


class Request(http.server.BaseHTTPRequestHandler):
    """What a client asks for, and the ways to answer it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urllib.parse.urlsplit(self.path)
        self.location = urllib.parse.unquote(parts.path)
        self.asked = dict(urllib.parse.parse_qsl(parts.query))
        self.serve()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def serve(self) -> None:
        raise NotImplementedError

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def reply_file(self, path: Path, store: Store) -> None:
        if not path.is_file():
            self.reply(404, b"{}", X_Error_Code="EntryNotFound")
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self.reply(200, content)
            return
        first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        store.ranges.append((first, last + 1))
        self.reply(206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(content)}")

    def log_message(self, *_: object) -> None:
        pass


def answer_as_bucket(request: Request, store: Store) -> None:
    """The JSON interface of Google's store: facts of an object, lists of objects, their content."""
    head = f"/storage/v1/b/{BUCKET}/o"
    if request.location.startswith(f"/download{head}/"):
        request.reply_file(store.root / request.location.removeprefix(f"/download{head}/"), store)
    elif request.location.startswith(f"{head}/"):
        path = store.root / request.location.removeprefix(f"{head}/")
        request.reply_json(describe_object(path, store)) if path.is_file() else request.reply(404, b"{}")
    elif request.location == head:
        prefix = request.asked.get("prefix", "")
        files = [path for path in sorted(store.root.rglob("*")) if path.is_file()]
        items = [describe_object(path, store) for path in files]
        request.reply_json({"items": [item for item in items if item["name"].startswith(prefix)]})
    else:
        request.reply(404, b"{}")


def describe_object(path: Path, store: Store) -> dict[str, str]:
    name = str(path.relative_to(store.root))
    return {"kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(path.stat().st_size)}


def answer_as_hub(request: Request, store: Store) -> None:
    """The Hub's interface for a data set's repository: its commit, facts of paths, trees, content."""
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        request.reply(401, b"{}")
        return
    head = f"/api/datasets/{DATA_SET}"
    if request.location in (head, f"{head}/revision/main"):
        request.reply_json({"id": DATA_SET, "sha": COMMIT, "siblings": [], "private": True})
    elif request.location.startswith(f"{head}/paths-info/"):
        asked = urllib.parse.parse_qs(request.body.decode())
        paths = asked["paths"] if asked else json.loads(request.body)["paths"]
        request.reply_json(
            [describe_path(store.root / path, store) for path in paths if (store.root / path).exists()]
        )
    elif tree := re.fullmatch(rf"{head}/tree/[^/]+/?(.*)", request.location):
        list_paths = (
            (store.root / tree[1]).rglob
            if request.asked["recursive"] == "true"
            else (store.root / tree[1]).glob
        )
        request.reply_json([describe_path(path, store) for path in sorted(list_paths("*"))])
    elif content := re.fullmatch(rf"/datasets/{DATA_SET}/resolve/[^/]+/(.*)", request.location):
        request.reply_file(store.root / content[1], store)
    else:
        request.reply(404, b"{}")


def describe_path(path: Path, store: Store) -> dict[str, Any]:
    name = str(path.relative_to(store.root))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": COMMIT}
    return {"type": "file", "path": name, "oid": COMMIT, "size": path.stat().st_size}


@pytest.fixture(params=["gs", "hf"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Store]]:
    """An address and the store behind it."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    root = tmp_path / "store"
    if request.param == "gs":
        pytest.importorskip("gcsfs", reason="the extra `remote` is not installed")
        store = Store(root, answer_as_bucket)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
        yield f"gs://{BUCKET}", store
    else:
        reason = "the extra `remote` is not installed"
        constants = pytest.importorskip("huggingface_hub.constants", reason=reason)
        store = Store(root, answer_as_hub)
        for name in ("HUGGINGFACE_CO_URL_TEMPLATE", "ENDPOINT"):
            real = getattr(constants, name)
            monkeypatch.setattr(constants, name, real.replace(constants.ENDPOINT, store.url))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield f"hf://datasets/{DATA_SET}", store
    store.server.shutdown()
    store.server.server_close()


def read_keys(location: str | Path, **options: Any) -> list[tuple[str, bytes]]:
    shards = open_shards(str(location), data=DataConfig(shards=str(location), **options)).shards
    samples = [shard.read(0, shard.info.samples) for shard in shards]
    return [(sample.key, sample.image) for each in samples for sample in each]


def test_a_store_gives_what_the_folder_holds(make_folder, store: tuple[str, Store]) -> None:
    location, _ = store
    folder = make_folder("store/sets/a", (5, 7, 3))
    expected = read_keys(folder)
    assert read_keys(f"{location}/sets/a") == expected
    assert read_keys(f"{location}/se*/a") == expected
    assert read_keys(f"{location}/sets/a/shard-0000{{0..1}}.tar") == expected[:12]


def test_no_byte_is_fetched_that_is_not_needed(make_folder, store: tuple[str, Store]) -> None:
    location, behind = store
    folder = make_folder("store/sets/a", (40,), side=64)
    with (folder / "shard-00000.tar").open("rb") as file:
        offsets = find_offsets(file, name="a")
    info = read_index(folder).shards[0]
    write_offsets(folder / info.name, offsets, sha256=info.sha256)
    shard = open_shards(f"{location}/sets/a", data=DataConfig(shards="x")).shards[0]
    behind.ranges.clear()
    assert [sample.key for sample in shard.read(30, 2)] == ["000000030", "000000031"]
    assert (offsets[30], offsets[32]) == behind.ranges[-1]


def test_a_store_that_fails_now_and_then_gives_the_same(
    make_folder, store: tuple[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    location, behind = store
    monkeypatch.setattr(remote, "CHUNK_BYTES", 4096)
    expected = read_keys(make_folder("store/sets/a", (9, 8)))
    requests = itertools.count(1)
    behind.status = lambda: 503 if next(requests) in (3, 7, 12) else None  # the libraries wait a second each
    assert read_keys(f"{location}/sets/a") == expected
    assert behind.failures == 3


def test_what_is_not_in_the_store_is_said(make_folder, store: tuple[str, Store]) -> None:
    location, _ = store
    folder = make_folder("store/sets/a", (2, 3))
    with pytest.raises(DataError, match=r"/sets/b holds no index\.json"):
        read_keys(f"{location}/sets/b")
    with pytest.raises(DataError, match=r"nothing matches .*/sets/x\*"):
        read_keys(f"{location}/sets/x*")
    (folder / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"sets/a/shard-00001\.tar is missing"):
        read_keys(f"{location}/sets/a")


def test_no_message_log_or_process_list_holds_the_token(
    make_folder, store: tuple[str, Store], caplog: pytest.LogCaptureFixture
) -> None:
    location, behind = store
    make_folder("store/sets/a", (4,))
    shard = open_shards(f"{location}/sets/a", data=DataConfig(shards="x", read_retries=1)).shards[0]
    if location.startswith("hf"):
        assert f"Bearer {TOKEN}" in behind.authorizations, "the stand-in is asked with the token"
    behind.status = lambda: 403
    with caplog.at_level(logging.DEBUG), pytest.raises(DataError, match="cannot be read") as error:
        list(shard.read(0, 4))
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    said = f"{error.value!r} {error.value.__cause__!r} {caplog.text} {shard!r} {processes}"
    assert TOKEN not in said


@pytest.mark.parametrize("store", ["hf"], indirect=True)
def test_a_store_that_refuses_is_not_asked_again(make_folder, store: tuple[str, Store]) -> None:
    location, behind = store
    make_folder("store/sets/a", (4,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_ofSomebodyElse")
        with pytest.raises((DataError, ConfigError)) as error:
            read_keys(f"{location}/sets/a")
    assert "hf_ofSomebodyElse" not in repr(error.value)
    assert behind.failures == 0
