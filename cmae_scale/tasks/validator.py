"""Validation while a task is trained: scores, the best network so far, and what it says of every image."""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.files import write_text
from cmae_scale.report.confusion import write_confusion
from cmae_scale.report.figures import read_metrics
from cmae_scale.tasks.evaluator import EvalResult, Evaluator
from cmae_scale.tasks.task import Task


@dataclass
class Validator:
    """An evaluation of the training loop. The best network so far is in RUN/model, the last in RUN/last."""

    task: Task
    evaluator: Evaluator
    gather: Callable[[], Mapping[str, Tensor]]  # the trained weights, on all ranks
    out: Path
    every_steps: int
    total_steps: int
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None

    def is_due(self, done: int) -> bool:
        """After every so many steps, and at the end."""
        return done % self.every_steps == 0 or done == self.total_steps

    def evaluate(self, done: int) -> dict[str, Any]:
        """Scores by name. All ranks call it together."""
        state = self.gather()
        outcome = self.task.evaluate(state, evaluator=self.evaluator)
        self.last = {"step": done, **outcome.found}
        is_best = self.best is None or outcome.found["val_top1"] > self.best["val_top1"]
        if is_best:
            self.best = self.last
            classes, is_first = self.evaluator.labelled.classes, self.evaluator.world.is_first
            write_predictions(self.out, outcome.result, classes=classes, is_first=is_first)
        if self.evaluator.world.is_first:
            if is_best:
                self.task.export(state, self.out / "model", head=outcome.head)
                draw_confusion(self.out, outcome.result, classes=self.evaluator.labelled.classes)
            if done == self.total_steps:
                self.task.export(state, self.out / "last", head=outcome.head)
        return outcome.found

    def recall(self, metrics: Path) -> None:
        """Take up the best and the last scores of a run that goes on from its metrics.jsonl."""
        found: list[dict[str, Any]] = []
        if self.evaluator.world.is_first and metrics.is_file():
            found = [line for line in read_metrics(metrics) if line.get("val_top1") is not None]
        found = [
            {name: value for name, value in line.items() if name == "step" or name.startswith("val_")}
            for line in gather_objects(found)[0]
        ]
        if found:
            self.last = found[-1]
            self.best = max(found, key=lambda line: float(line["val_top1"]))  # the first of equals


def draw_confusion(out: Path, result: EvalResult, *, classes: tuple[str, ...]) -> None:
    """RUN/confusion.png; a picture comes after what it shows is on disk."""
    write_confusion(out / "confusion.png", confusion=result.scores.confusion, names=classes)


def write_predictions(out: Path, result: EvalResult, *, classes: tuple[str, ...], is_first: bool) -> None:
    """RUN/predictions.csv, in the order of the shards. All ranks call it together."""
    share, guess = result.probabilities.max(dim=1)
    own = list(
        zip(
            result.features.keys,
            result.features.labels.tolist(),
            guess.tolist(),
            share.tolist(),
            strict=True,
        )
    )
    parts = gather_objects(own)
    if not is_first:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("key", "label", "predicted", "probability"))
    for part in parts:
        for key, label, predicted, probability in part:
            name = classes[label] if label >= 0 else ""
            writer.writerow((key, name, classes[predicted], f"{probability:.4f}"))
    write_text(out / "predictions.csv", text.getvalue())
