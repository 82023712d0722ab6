"""Every task through the command: the same over ranks, stages and restarts, and what it leaves behind."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from cmae_scale.core.errors import ConfigError

pytestmark = pytest.mark.dist

FULL = {"finetune": {"drop_path": 0.3, "mix_rows": 6}}
PARTIAL = {"finetune": {"blocks": 1, "drop_path": 0.3, "ema": 0.5}}
PROBE = {"linear": {"pool": "mean", "sweep": [1.0, 3.0]}}
ONCE = {"linear": {"pool": "cls", "features": "once"}}
TASKS = {
    "full": (FULL, "AdamW"),
    "partial": (PARTIAL, "AdamW"),
    "probe": (PROBE, "LARS"),
    "once": (ONCE, "LARS"),
}
# what pre-training and a fine-tuned hybrid share
MOVED = {"pos_embed", *(f"patch_embed{n}" for n in range(1, 5)), *(f"blocks{n}" for n in range(1, 4))}

Command = Callable[..., list[int]]


@pytest.mark.slow_unless(task="full", stage=2)
@pytest.mark.slow_unless(task="once")
@pytest.mark.parametrize(
    ("task", "ranks", "stage", "accumulation"),
    [
        ("full", 1, 0, 2),
        ("full", 2, 1, 1),
        ("full", 2, 2, 2),
        ("full", 2, 3, 1),
        ("partial", 2, 2, 1),
        ("probe", 2, 0, 2),
        ("once", 2, 0, 1),
    ],
)
def test_ranks_stages_and_accumulation_change_nothing(
    arguments: Callable[..., list[str]],
    transfer: Command,
    losses_of: Callable[[Path], list[float]],
    weights_of: Callable[[Path], dict[str, torch.Tensor]],
    tmp_path: Path,
    task: str,
    ranks: int,
    stage: int,
    accumulation: int,
) -> None:
    settings, optimizer = TASKS[task]
    if task == "probe":  # batch norm sees one micro-batch of all ranks at a time
        accumulation = 1
    spread = [f"zero_optimization.stage={stage}", f"gradient_accumulation_steps={accumulation}"]
    assert transfer(arguments(settings, out="plain", optimizer=optimizer)) == [0]
    line = arguments(settings, *spread, out="spread", optimizer=optimizer)
    assert transfer(line, ranks=ranks) == [0] * ranks
    plain, other = (torch.tensor(losses_of(tmp_path / name)) for name in ("plain", "spread"))
    assert len(plain) == 4
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
    ours, theirs = (weights_of(tmp_path / name) for name in ("spread", "plain"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "spread")]
    assert results[0]["last"]["val_images"] == results[1]["last"]["val_images"] == 21
    assert results[0]["last"]["val_top1"] == results[1]["last"]["val_top1"]


@pytest.mark.slow_unless(task="partial")
@pytest.mark.parametrize(("task", "stage"), [("full", 3), ("partial", 2), ("probe", 0)])
def test_a_hybrid_goes_through_the_same_tasks(
    arguments: Callable[..., list[str]],
    transfer: Command,
    losses_of: Callable[[Path], list[float]],
    weights_of: Callable[[Path], dict[str, torch.Tensor]],
    hybrid_folder: Path,
    shards: Path,
    tmp_path: Path,
    task: str,
    stage: int,
) -> None:
    settings, optimizer = TASKS[task]
    place = f"transfer.encoder.place={hybrid_folder}"
    spread = [place, f"zero_optimization.stage={stage}", "transfer.encoder.remat=full"]
    assert transfer(arguments(settings, place, out="plain", optimizer=optimizer)) == [0]
    assert transfer(arguments(settings, *spread, out="spread", optimizer=optimizer), ranks=2) == [0, 0]
    plain, other = (torch.tensor(losses_of(tmp_path / name)) for name in ("plain", "spread"))
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
    ours, theirs = (weights_of(tmp_path / name) for name in ("spread", "plain"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    before = load_file(hybrid_folder / "model.safetensors")
    moved = {
        name.split(".")[0] for name in before if name in ours and not torch.equal(ours[name], before[name])
    }
    assert moved == {"full": MOVED, "partial": {"blocks3"}, "probe": set()}[task]
    assert_classify_says_what_was_predicted(tmp_path / "plain", shards)


def assert_classify_says_what_was_predicted(run: Path, shards: Path) -> None:
    from cmae_scale.tasks.classify import guess, open_classifier

    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    classifier = open_classifier(str(run / "model"))
    pictures = sorted((shards / "images" / "val").rglob("*.png"))
    guesses = [guess(classifier, picture.read_bytes(), count=1)[0] for picture in pictures]
    assert len(rows) == len(guesses)
    said = sorted((row["predicted"], float(row["probability"])) for row in rows)
    for (name, probability), (predicted, expected) in zip(sorted(guesses), said, strict=True):
        assert name == predicted
        assert probability == pytest.approx(expected, abs=2e-3)


def test_a_hybrids_neighbours_are_those_of_its_pooled_tokens(
    arguments: Callable[..., list[str]], transfer: Command, hybrid_folder: Path, tmp_path: Path
) -> None:
    place = f"transfer.encoder.place={hybrid_folder}"
    assert transfer(arguments({"knn": {"k": 5}}, place), ranks=2) == [0, 0]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["knn_images"] == 21


def test_an_encoder_alone_classifies_nothing(encoder_folder: Path, hybrid_folder: Path) -> None:
    from cmae_scale.tasks.classify import open_classifier

    for folder in (encoder_folder, hybrid_folder):
        with pytest.raises(ConfigError, match="is an encoder without classes"):
            open_classifier(str(folder))


@pytest.mark.slow
def test_a_file_of_another_project_is_an_encoder_too(
    arguments: Callable[..., list[str]], transfer: Command, encoder_folder: Path, tmp_path: Path
) -> None:
    state = load_file(encoder_folder / "model.safetensors")
    torch.save({"model": state}, tmp_path / "mae.pth")
    (tmp_path / "bare").mkdir()
    shutil.copy(encoder_folder / "model.safetensors", tmp_path / "bare")
    found = []
    known = ["transfer.crop.mean=[0.4,0.5,0.6]", "transfer.crop.std=[0.2,0.25,0.3]"]
    known.append("transfer.encoder.num_heads=2")
    for number, place in enumerate((encoder_folder, tmp_path / "mae.pth", tmp_path / "bare")):
        line = arguments({"knn": {"k": 5}}, f"transfer.encoder.place={place}", *known, out=f"{number}")
        assert transfer(line) == [0]
        found.append(json.loads((tmp_path / f"{number}" / "results.json").read_text()))
        del found[-1]["encoder"]
    assert found[0] == found[1] == found[2]


@pytest.mark.slow_unless(task="full")
@pytest.mark.parametrize("task", TASKS)
def test_stopping_and_going_on_is_as_never_having_stopped(
    arguments: Callable[..., list[str]],
    transfer: Command,
    losses_of: Callable[[Path], list[float]],
    weights_of: Callable[[Path], dict[str, torch.Tensor]],
    tmp_path: Path,
    task: str,
) -> None:
    settings, optimizer = TASKS[task]
    straight = arguments(settings, out="straight", optimizer=optimizer)
    stopped = arguments(settings, out="stopped", optimizer=optimizer)
    assert transfer(straight) == [0]
    assert transfer([*stopped, "--stop_at", "2"]) == [0]
    assert not (tmp_path / "stopped" / "results.json").exists()
    assert transfer(stopped) == [0]
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    one, other = (weights_of(tmp_path / name) for name in ("stopped", "straight"))
    assert [name for name, value in other.items() if not torch.equal(one[name], value)] == []
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("stopped", "straight")]
    assert results[0]["best"]["step"] == results[1]["best"]["step"]
    assert results[0]["last"] == results[1]["last"]


def test_a_run_leaves_a_timm_model_predictions_and_pictures(
    arguments: Callable[..., list[str]],
    transfer: Command,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = arguments({"finetune": {"layer_decay": 1.0}}, "transfer.schedule.duration=40st")
    assert transfer([*line, "--set", "transfer.monitor.evaluate_every=10st"]) == [0]
    run = tmp_path / "run"
    for picture in ("confusion.png", "curves.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["ash", "birch", "cedar"]
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = json.loads((run / "results.json").read_text())["best"]
    assert len(rows) == 21
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert best["val_top1"] == pytest.approx(right / 21, abs=1e-6)
    assert best["val_top1"] > 0.8  # colours tell the classes apart

    from cmae_scale.classify import main

    picture = str(shards / "images" / "val" / "birch" / "0.png")
    assert main(["--model", str(run / "model"), "--json", picture]) == 0
    guesses = json.loads(capsys.readouterr().out)["guesses"]
    assert sum(guesses.values()) == pytest.approx(1.0, abs=1e-4)
    assert next(iter(guesses)) in ("ash", "birch", "cedar")


def test_the_exported_probe_says_what_the_probe_said(
    arguments: Callable[..., list[str]], transfer: Command, shards: Path, tmp_path: Path
) -> None:
    assert transfer(arguments(PROBE, optimizer="LARS")) == [0]
    assert_classify_says_what_was_predicted(tmp_path / "run", shards)


@pytest.mark.slow
def test_heads_of_a_sweep_train_as_if_alone(
    arguments: Callable[..., list[str]], transfer: Command, tmp_path: Path
) -> None:
    def top1(sweep: list[float], out: str) -> list[dict[str, Any]]:
        task = {"linear": {"pool": "mean", "sweep": sweep}}
        assert transfer(arguments(task, out=out, optimizer="LARS")) == [0]
        lines = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]

    both = top1([1.0, 30.0], "both")
    alone = {scale: top1([scale], f"alone{scale:g}") for scale in (1.0, 30.0)}
    for number, line in enumerate(both):
        for scale, lines in alone.items():
            assert line[f"loss_x{scale:g}"] == pytest.approx(lines[number]["loss"], rel=1e-5)


def test_partial_fine_tuning_changes_the_named_blocks_alone(
    arguments: Callable[..., list[str]],
    transfer: Command,
    weights_of: Callable[[Path], dict[str, torch.Tensor]],
    encoder_folder: Path,
    tmp_path: Path,
) -> None:
    before = load_file(encoder_folder / "model.safetensors")
    assert transfer(arguments({"finetune": {"blocks": 2}})) == [0]
    after = weights_of(tmp_path / "run")
    changed = {
        name for name, value in after.items() if name not in before or not torch.equal(value, before[name])
    }
    trained = {name for name in after if name.startswith(("blocks.1.", "blocks.2.", "fc_norm.", "head."))}
    assert changed == trained


def test_neighbours_by_command_are_counted_exactly_on_two_ranks(
    arguments: Callable[..., list[str]], transfer: Command, tmp_path: Path
) -> None:
    assert transfer(arguments({"knn": {"k": 5}}, out="one")) == [0]
    assert transfer(arguments({"knn": {"k": 5}}, out="two"), ranks=2) == [0, 0]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert one["knn_images"] == 21
    predictions = [(tmp_path / name / "predictions.csv").read_text() for name in ("one", "two")]
    assert predictions[0] == predictions[1]


@pytest.mark.parametrize(
    ("task", "overrides", "told"),
    [
        ({"knn": {}, "linear": {}}, [], "write exactly one of knn, linear, finetune, not knn and linear"),
        (
            {"finetune": {"mixupp": 1}},
            [],
            "\"transfer.task.finetune.mixupp\" is not a setting; did you mean 'mixup'?",
        ),
        ({"finetune": {}}, ["cmae.seed=1"], 'the settings of this run are "transfer"'),
        ({"finetune": {}}, ["transfer.encoder.place=nowhere"], "no encoder at nowhere"),
        ({"finetune": {"blocks": 9}}, [], "transfer.task.finetune.blocks 9"),
        ({"finetune": {"rand_augment": "rand-x9"}}, [], 'rand_augment "rand-x9" is not understood by timm'),
        ({"finetune": {}}, ["train_batch_size=15"], "write an even one"),
        ({"finetune": {"ema": 0.9}}, ["zero_optimization.stage=3"], "write zero_optimization.stage=2"),
        (
            {"linear": {}},
            ["optimizer.type=LARS", "zero_optimization.stage=3"],
            "write zero_optimization.stage=0",
        ),
    ],
    ids=lambda value: "",
)
def test_a_mistake_is_told_in_one_sentence(
    arguments: Callable[..., list[str]],
    on_ranks: Callable[..., list[Any]],
    task: dict[str, Any],
    overrides: list[str],
    told: str,
) -> None:
    def run() -> tuple[int, str]:
        import contextlib
        import io

        from cmae_scale.transfer import main

        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            return main(arguments(task, *overrides)), stderr.getvalue()

    [(status, stderr)] = on_ranks(run, ranks=1)
    [error] = [line for line in stderr.splitlines() if line.startswith("error")]
    assert status == 2
    assert told in error
