"""A secret planted in every place of a run's settings is in no file of its folder and in no line it says."""

import base64
import functools
import http.server
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.run_file import read_run
from cmae_scale.core.errors import ConfigError
from tests.small import SMALL

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

TOKEN = "planted0secret"
NAMES = ("shards", "val_shards")
SHORT = [*SMALL, "cmae.schedule.duration=4st", "cmae.checkpoint.every=2st"]


class Doorkeeper(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files, and only to who knows the token, as user's password and in the query."""

    def send_head(self) -> Any:
        expected = "Basic " + base64.b64encode(f"reader:{TOKEN}".encode()).decode()
        path = Path(self.translate_path(self.path))
        if self.headers.get("Authorization") != expected or f"sig={TOKEN}" not in self.path:
            return self.send_error(403)
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2])) if asked else (0, len(content) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(content[first : last + 1])))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        return io.BytesIO(content[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    from data_prep.make_shards import main

    main(["--source", "digits", "--out", str(tmp_path / "web")])
    return tmp_path / "web"


@pytest.fixture
def host(digits: Path) -> Iterator[str]:
    handler = functools.partial(Doorkeeper, directory=str(digits))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_no_file_and_no_line_of_a_run_holds_a_secret(
    host: str, let_ranks_end: Callable[..., Any], tmp_path: Path, repository: Path
) -> None:
    pytest.importorskip("wandb")
    places = [f"http://reader:{TOKEN}@{host}/{split}?sig={TOKEN}" for split in ("train", "val")]
    run, said = tmp_path / "cmae", tmp_path / "said"

    def start(*more: str, file: str = "quickstart.json", kind: str = "cmae", status: int = 0) -> str:
        data = [f"{kind}.data.{name}={place}" for name, place in zip(NAMES, places, strict=True)]
        config = ("--deepspeed_config", str(repository / "ds_configs" / file))
        arguments = [*config, "--set", *data, *more, "--out", str(tmp_path / kind)]

        def be() -> int:
            from cmae_scale import pretrain, transfer

            main = pretrain.main if kind == "cmae" else transfer.main
            os.chdir(tmp_path)
            os.environ["WANDB_MODE"] = "offline"
            with said.open("a") as file:
                os.dup2(file.fileno(), 1)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.argv = ["pretrain.py", *arguments]
            return main()

        [end] = let_ranks_end(be, ranks=1)
        lines: str = end.stderr + said.read_text()
        assert end.status == status, lines
        return lines

    wandb = ["wandb.enabled=true", "wandb.project=x", "comet.enabled=false", f"comet.api_key={TOKEN}"]
    first = start(*SHORT, *wandb, "cmae.schedule.base_lr=1e-4")
    for state in (run / "checkpoints").glob("step_*4"):
        state.rename(tmp_path / "last")
    second = start(*SHORT, *wandb, "cmae.schedule.base_lr=2e-4")
    assert "settings changed" in second
    assert "cmae.data" not in second.split("settings changed", 1)[1].split("\n")[0]
    place = f"transfer.encoder.place={run}/encoder"
    knn = start(place, "transfer.crop.img_px=32", file="transfer/knn.json", kind="transfer")
    refused = start(f"cmae.data.shards=http://reader:{TOKEN}@{host}/train?sig=other", *SHORT, status=2)
    assert "403" in refused
    assert TOKEN not in first + second + knn + refused
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "web" not in path.parts]
    assert {"README.md", "config.json", "state.json", "exit.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    secrets = (TOKEN.encode(), base64.b64encode(f"reader:{TOKEN}".encode()))
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []
    for path in (*tmp_path.glob("*/config.json"), *run.glob("checkpoints/*/state.json")):
        assert path.stat().st_mode & 0o077 == 0, path
    with pytest.raises(ConfigError, match=r"cmae\.data\.shards, cmae\.data\.val_shards held a secret"):
        read_run(run / "config.json")
