"""What a run cannot be is said before torch is imported, from the run file and local indexes alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.run_file import RunKind, read_run
from cmae_scale.core.errors import UserError
from cmae_scale.data.index import ShardIndex, ShardInfo, write_index
from cmae_scale.planning.advice import check_run

FILES = Path(__file__).resolve().parent.parent / "ds_configs"


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """`write_shards(name, samples, classes)`: an index without its shards, for nobody may look for them."""

    def write(name: str, samples: int = 1000, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        info = ShardInfo("0.tar", samples, bytes=10**6, sha256="0" * 64)
        write_index(ShardIndex(folder, (info,), classes, samples, "test", {}))
        return folder

    return write


@pytest.fixture
def places(write_shards: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    return {
        "train": write_shards("train"),
        "val": write_shards("val"),
        "plain": write_shards("plain", classes=()),
        "birds": write_shards("birds", classes=("crow", "owl")),
        "few": write_shards("few", samples=5),
        "nowhere": tmp_path / "nowhere",
    }


def check(config: str, places: dict[str, Path], *overrides: str, ranks: int = 1) -> None:
    kind: RunKind = "transfer" if config.startswith("transfer/") else "cmae"
    begun_nowhere = f"{kind}.out={places['nowhere']}"  # a quickstart may have been run here
    settings = [begun_nowhere, *(text.format(**places) for text in overrides)]
    run = read_run(FILES / config, settings, kind=kind)
    check_run(run, ranks=ranks)


DATA = ["cmae.data.shards={train}", "cmae.data.val_shards={val}"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["cmae.data.shards={nowhere}"], "nowhere holds no index.json"),
        (["cmae.data.val_shards={nowhere}"], "nowhere holds no index.json"),
        (["cmae.data.shards={few}"], "fewer than train_batch_size"),
        (['cmae.data.shards=["{train}", "{birds}"]'], "has other classes than"),
        (['cmae.data.shards=["{train}", "{train}"]'], "names a shard twice"),
        (["cmae.data.shards=ftp://host/train"], "shards are not read from ftp"),
        (
            ["cmae.monitor.knn={{}}", "cmae.data.shards={plain}", "cmae.data.val_shards={plain}"],
            "has no classes",
        ),
        (['cmae.monitor.knn={{"val_shards": "{birds}"}}'], "has other classes than"),
        (["cmae.monitor.knn={{}}", "cmae.data.val_shards=null"], "write its val_shards, or data.val_shards"),
        (['cmae.monitor.knn={{"shards": "{nowhere}"}}'], "nowhere holds no index.json"),
        (["cmae.model.init={nowhere}"], "cmae.model.init .*nowhere does not exist"),
        (["train_batch_size=63"], "2 ranks do not divide 63"),
        (["cmae.data.streams=7"], "does not divide train_batch_size"),
        (["cmae.schedule.duration=0.001ep"], "is less than a step"),
        (["optimizer=null"], "optimizer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_run_cannot_be_is_told(places: dict[str, Path], overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check("quickstart.json", places, *DATA, *overrides, ranks=2)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["cmae.monitor.knn={{}}"],
        ["cmae.data.shards=s3://bucket/train"],
        [
            "cmae.data.shards=https://host/train",
            "cmae.data.val_shards=gs://bucket/val",
            "cmae.monitor.knn={{}}",
        ],
        ["cmae.data.shards=pipe:cat {{name}}", "cmae.data.allow_commands=true"],
        ["cmae.model.init={train}"],
    ],
    ids=" ".join,
)
def test_what_may_be_is_let_pass_without_a_look_at_shards_or_network(
    places: dict[str, Path], overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    check("quickstart.json", places, *DATA, *overrides, ranks=2)


@pytest.mark.parametrize("config", ["knn.json", "linear_vitb.json", "finetune_vits.json"])
def test_so_is_a_transfer_run(places: dict[str, Path], config: str) -> None:
    data = ["transfer.data.shards={train}", "transfer.data.val_shards={val}"]
    data += ["transfer.encoder.place={train}"]
    check(f"transfer/{config}", places, *data, ranks=8)
    check(f"transfer/{config}", places, *data, "transfer.encoder.place=timm:vit_tiny_patch16_224")
    for override, told in (
        ("transfer.data.val_shards={birds}", "other classes"),
        ("transfer.data.shards={plain}", "no classes"),
        ("transfer.encoder.place={nowhere}", "no encoder at .*nowhere"),
        ("transfer.encoder.place=local-dir:{nowhere}", "no encoder at .*nowhere"),
    ):
        with pytest.raises(UserError, match=told):
            check(f"transfer/{config}", places, *data, override)
    if config != "knn.json":
        with pytest.raises(UserError, match="do not divide"):
            check(f"transfer/{config}", places, *data, ranks=7)


@pytest.mark.parametrize("command", ["pretrain", "transfer"])
def test_a_command_refuses_without_torch(command: str, tmp_path: Path, repository: Path) -> None:
    config = FILES / ("quickstart.json" if command == "pretrain" else "transfer/knn.json")
    arguments = ["--deepspeed_config", str(config), "--out", str(tmp_path / "run")]
    code = f"""
import json, sys
from cmae_scale.{command} import main
print(json.dumps([main({arguments!r}), "torch" in sys.modules]))"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(repository), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == [2, False], done.stderr
    assert "holds no index.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_weights_to_start_from_are_of_no_more_need_when_a_run_has_begun(
    places: dict[str, Path], tmp_path: Path
) -> None:
    changes = [*DATA, "cmae.model.init={nowhere}", f"cmae.out={tmp_path}"]
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    check("quickstart.json", places, *changes)
    with pytest.raises(UserError, match="does not exist"):
        check("quickstart.json", places, *changes, "cmae.checkpoint.resume=never")
