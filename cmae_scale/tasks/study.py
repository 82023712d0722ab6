"""The cells of a study, and what their run folders say when they are done."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmae_scale.config.study import CellConfig, StudyConfig
from cmae_scale.core.errors import DataError
from cmae_scale.core.strict_json import parse_json
from cmae_scale.report.convergence import Curve, find_overtake
from cmae_scale.report.figures import read_metrics
from cmae_scale.tasks.results import format_table

PRETRAIN, TRANSFER, RANDOM = "pretrain", "transfer", "random"


@dataclass(frozen=True)
class Cell:
    """One run: what a user would start, in which folder it ends, and the file that says that it has ended."""

    name: str
    command: str  # file name in cmae_scale/, without ending
    arguments: tuple[str, ...]
    out: Path
    mark: Path

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.mark.is_file()


def plan_cells(study: StudyConfig, *, folder: Path, out: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """All runs in the order in which they need one another; `folder` is that of the study's file.

    Overrides that begin with cmae. go to pre-training, with transfer. to the tasks, others to all runs.
    """
    cells = []
    for name, cell in study.pretrain.items():
        run = out / name
        extra = [one for one in overrides if not one.startswith("transfer.")]
        arguments = _arguments(cell, extra, folder=folder, out=run)
        cells.append(Cell(name, PRETRAIN, arguments, run, run / "encoder" / "config.json"))
    for encoder in list_encoders(study):
        for task, cell in study.tasks.items():
            run = out / f"{task}_{encoder}"
            source = study.random if encoder == RANDOM else encoder
            start = [f"transfer.encoder.place={json.dumps(str(out / str(source) / 'encoder'))}"]
            if encoder == RANDOM:
                start.append("transfer.encoder.random=true")
            extra = [*start, *(one for one in overrides if not one.startswith("cmae."))]
            arguments = _arguments(cell, extra, folder=folder, out=run)
            cells.append(Cell(f"{task} of {encoder}", TRANSFER, arguments, run, run / "results.json"))
    return cells


def list_encoders(study: StudyConfig) -> list[str]:
    """Names of what is evaluated."""
    return [*study.pretrain, *([RANDOM] if study.random is not None else [])]


def _arguments(cell: CellConfig, extra: Sequence[str], *, folder: Path, out: Path) -> tuple[str, ...]:
    settings = [*cell.set, *extra]
    return (
        "--deepspeed_config",
        str(folder / cell.config),
        *(["--set", *settings] if settings else []),
        "--out",
        str(out),
    )


def read_scores(study: StudyConfig, out: Path) -> dict[str, dict[str, float]]:
    """Top-1 by encoder and task, of the finished cells; of trained tasks at the end, not at the best."""
    scores: dict[str, dict[str, float]] = {}
    for encoder in list_encoders(study):
        scores[encoder] = {}
        for task in study.tasks:
            path = out / f"{task}_{encoder}" / "results.json"
            if path.is_file():
                scores[encoder][task] = _read_top1(path)
    return scores


def _read_top1(path: Path) -> float:
    try:
        results: Mapping[str, Any] = parse_json(path.read_bytes())
        found = results["last"]["val_top1"] if "last" in results else results["knn_top1"]
        return float(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and run the study again") from None


def read_curve(run: Path) -> Curve:
    """Validation top-1 of a run by epoch."""
    lines = read_metrics(run / "metrics.jsonl")
    points = [(line.get("epoch"), line.get("val_top1")) for line in lines]
    return [(float(x), float(y)) for x, y in points if x is not None and y is not None]


def read_overtakes(curves: Mapping[str, Curve]) -> dict[str, dict[str, float | None]]:
    """For each pair of runs, the epoch at which the first passes the other's final accuracy."""
    return {
        name: {
            other: find_overtake(curve, curves[other][-1][1])
            for other in curves
            if other != name and curves[other]
        }
        for name, curve in curves.items()
    }


def tabulate_scores(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Encoders down, tasks across."""
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    rows = [("top-1", *tasks)]
    for encoder, found in scores.items():
        rows.append((encoder, *(f"{found[task]:.4f}" if task in found else "-" for task in tasks)))
    return format_table(rows)
