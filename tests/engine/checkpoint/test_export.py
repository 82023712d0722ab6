"""A run's weights without its engine: from its folder or one of its states, whoever wrote them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmae_scale.checkpoints.commit import list_checkpoints, read_description, write_description
from cmae_scale.config.run_file import dump_run
from cmae_scale.core.errors import ConfigError
from cmae_scale.models import build_cmae, read_encoder
from cmae_scale.models.export import export_run
from cmae_scale.models.formats.model_file import read_model_file
from cmae_scale.models.initial import start_from_
from cmae_scale.models.pretrained import open_encoder
from cmae_scale.pretrain import main
from cmae_scale.tasks.export import export_newest

pytestmark = pytest.mark.dist

PRECISIONS = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
}
CONV = {"conv": {"dims": [8, 12], "depths": [1, 1]}}


@pytest.mark.parametrize(
    ("ranks", "precision"),
    [
        (2, "fp32"),
        (1, "bf16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "fp32"), (2, "bf16")]),
        *(pytest.param(ranks, "autocast", marks=pytest.mark.slow) for ranks in (1, 2)),
    ],
)
def test_a_state_of_any_topology_gives_the_weights_that_its_engine_gathers(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    tmp_path: Path,
    ranks: int,
    precision: str,
) -> None:
    runs = [
        tiny_run(ranks=ranks, stage=stage, cmae={"out": str(tmp_path / str(stage))}, **PRECISIONS[precision])
        for stage in range(4)
    ]

    def train() -> list[dict[str, Tensor]]:
        return [train_tiny(run, steps=2, save_at=2)["weights"] for run in runs]

    for run, weights in zip(runs, on_ranks(train, ranks=ranks)[0], strict=True):
        tensors = read_model_file(run.out).tensors
        assert tensors.keys() == weights.keys()
        for name, expected in weights.items():
            found = tensors[name]
            if precision == "bf16" and torch.equal(expected.bfloat16().to(expected.dtype), expected):
                found = found.bfloat16().to(found.dtype)  # no master of it is to be had from the engine
            assert found.dtype == (torch.float32 if expected.is_floating_point() else expected.dtype)
            torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=0, msg=name)


_trained: dict[str, Path] = {}  # folders of runs by their settings: each is trained once


@pytest.fixture
def unfinished(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Any]:
    """`unfinished(**cmae)`: a run with the states of steps 1 and 2, and no encoder."""

    def train(run: Any) -> None:
        train_tiny(run, steps=1, save_at=1)
        train_tiny(run, steps=2, save_at=2)

    def copy(**cmae: Any) -> Any:
        name = json.dumps(cmae)
        if name not in _trained:
            _trained[name] = tmp_path_factory.mktemp("trained") / "run"
            run = tiny_run(cmae={**cmae, "out": str(_trained[name])})
            on_ranks(lambda: train(run), ranks=1)
        run = tiny_run(cmae=cmae)
        shutil.copytree(_trained[name], run.out)
        return run

    return copy


def test_the_folder_the_states_and_a_state_are_all_understood(unfinished: Callable[..., Any]) -> None:
    run = unfinished()
    newest, older = list_checkpoints(run.out / "checkpoints")
    expected = read_model_file(newest)
    assert expected.notices == ("weights of step 2 of run",)
    for place in (run.out, run.out / "checkpoints"):
        found = read_model_file(place)
        assert found.path == newest
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert read_model_file(older).notices == ("weights of step 1 of run",)
    encoder = open_encoder(str(run.out))
    assert torch.equal(encoder.state["norm.weight"], expected.part("online_encoder")["norm.weight"])
    other = build_cmae(run.cmae)
    assert "online_encoder" in start_from_(other, run.cmae, path=run.out)[0]
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in expected.tensors.items())


def test_a_damaged_state_is_passed_over_as_in_resuming_and_refused_by_itself(
    unfinished: Callable[..., Any],
) -> None:
    run = unfinished()
    newest, older = list_checkpoints(run.out / "checkpoints")
    share = newest / "rank_00000.safetensors"
    share.write_bytes(share.read_bytes()[:-1])
    found = read_model_file(run.out)
    assert found.path == older
    assert found.notices == (
        f"warning: {share} is damaged, so an older checkpoint was taken",
        "weights of step 1 of run",
    )
    with pytest.raises(ConfigError, match=r"is damaged: give the run's folder"):
        read_model_file(newest)
    shutil.rmtree(older)
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole .*or give the folder"):
        open_encoder(str(run.out))


@pytest.mark.parametrize(
    "cmae", [{}, {"model": CONV}, {"loss": {"weight": 0.0}}], ids=["CMAE", "hybrid", "MAE"]
)
def test_an_unfinished_run_exports_what_its_end_would(unfinished: Callable[..., Any], cmae: Any) -> None:
    run = unfinished(**cmae)
    run.out.joinpath("config.json").write_text(dump_run(run))
    lines = [{"step": step, "samples": 8 * step, "loss": step / 4} for step in (1, 2, 3)]
    run.out.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["--deepspeed_config", str(run.out / "config.json"), "--export_only"]) == 0
    exported = run.out / "encoder"
    weights = read_model_file(run.out).part("online_encoder")
    assert all(torch.equal(read_encoder(exported).state_dict()[name], t) for name, t in weights.items())
    assert "16 images seen in 2 steps" in (exported / "README.md").read_text()
    written = {path.name: path.read_bytes() for path in exported.iterdir()}
    export_run(run, weights, metrics=lines[1])
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == written


def test_of_many_processes_the_first_exports(
    unfinished: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unfinished()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    export_newest(run)
    assert not (run.out / "encoder").exists()


def test_a_run_without_a_state_is_told(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run()
    run.out.mkdir()
    with pytest.raises(ConfigError, match=r"holds no checkpoint of a pre-training run"):
        export_newest(run)
    with pytest.raises(ConfigError, match="or a run that has saved a state"):
        read_model_file(run.out)


def test_when_the_states_are_gone_the_exported_encoder_is_taken(unfinished: Callable[..., Any]) -> None:
    run = unfinished()
    export_newest(run)
    shutil.rmtree(run.out / "checkpoints")
    assert read_model_file(run.out).path == run.out / "encoder"
    assert open_encoder(str(run.out)).args["embed_dim"] == 32


def test_the_target_branch_is_an_encoder_too(unfinished: Callable[..., Any], tmp_path: Path) -> None:
    from cmae_scale.convert import main as convert

    run = unfinished()
    arguments = [str(run.out), str(tmp_path / "target"), "--to", "timm", "--part", "target"]
    assert convert(arguments) == 0
    target = read_model_file(run.out).part("target_encoder")
    found = read_encoder(tmp_path / "target").state_dict()
    assert found.keys() == target.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in target.items())
    assert convert([str(tmp_path / "target"), str(tmp_path / "again"), "--to", "encoder"]) == 0
    with pytest.raises(ConfigError, match="has no target branch"):
        read_model_file(tmp_path / "target").to_target()


def test_a_conversion_may_lie_in_its_run_and_be_replaced_there(unfinished: Callable[..., Any]) -> None:
    from cmae_scale.convert import main as convert

    run = unfinished()
    newest = list_checkpoints(run.out / "checkpoints")[0]
    arguments = [str(run.out), str(run.out / "timm"), "--to", "timm"]
    assert [convert(arguments), convert(arguments), convert([*arguments, "--overwrite"])] == [0, 2, 0]
    for out in (run.out, run.out / "checkpoints", newest):
        assert convert([str(run.out), str(out), "--to", "timm", "--overwrite"]) == 2
    assert read_model_file(run.out).path == newest


def change_run_file(state: Path, **settings: Any) -> None:
    """As a version with other settings would have written it."""
    description = read_description(state)
    description["stamp"]["run"]["cmae"] |= settings
    write_description(state, description)


def test_weights_outlive_settings_of_the_method_that_are_no_more(unfinished: Callable[..., Any]) -> None:
    run = unfinished()
    weights = read_model_file(run.out).tensors
    for state in list_checkpoints(run.out / "checkpoints"):
        change_run_file(state, mask={"ratio": 7, "shape": "round"}, curriculum=True)
    found = read_model_file(run.out).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ConfigError, match=r"settings that this version does not have \(cmae\.mask\.ratio\)"):
        export_newest(run)
    change_run_file(list_checkpoints(run.out / "checkpoints")[0], model={"encoder": "vit_vast"})
    with pytest.raises(ConfigError, match=r"does not have \(cmae\.model\.encoder\)"):
        read_model_file(run.out)


def test_a_state_of_another_format_is_told(unfinished: Callable[..., Any]) -> None:
    run = unfinished()
    newest = list_checkpoints(run.out / "checkpoints")[0]
    write_description(newest, {"step": 2, "stamp": {"format": 1}, "files": read_description(newest)["files"]})
    with pytest.raises(ConfigError, match=r"has format 1, this version reads 2"):
        read_model_file(run.out)


def test_exporting_needs_no_engine(unfinished: Callable[..., Any], repository: Path) -> None:
    run = unfinished()
    (run.out / "config.json").write_text(dump_run(run))
    arguments = ["--deepspeed_config", str(run.out / "config.json"), "--export_only"]
    code = f"""
import sys
from cmae_scale.pretrain import main
sys.exit(main({arguments!r}) or "deepspeed" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "weights of step 2 of run" in done.stdout
