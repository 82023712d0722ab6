"""What a run came to, as results.json and as a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmae_scale.core.credentials import mask_tree, write_settings
from cmae_scale.core.terminal import make_safe_name


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """The file, whole or not at all."""
    write_settings(path, json.dumps(mask_tree(results), indent=2) + "\n")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a head (the first row), columns aligned: the first to the left, the others to the right."""
    rows = [[make_safe_name(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def tabulate(scores: Mapping[str, Mapping[str, Any]], *, prefix: str) -> str:
    """A line per entry ("best", "last"): step, top-1, top-5, images."""
    rows = [("", "step", "top-1", "top-5", "images")]
    for name, found in scores.items():
        rows.append(
            (
                name,
                str(found.get("step", "-")),
                f"{found[f'{prefix}_top1']:.4f}",
                f"{found[f'{prefix}_top5']:.4f}",
                f"{found[f'{prefix}_images']:,}",
            )
        )
    return format_table(rows)


def tabulate_classes(per_class: Mapping[str, float], *, most: int = 20) -> str:
    """Top-1 of each class, worst first; the first `most` of them."""
    worst = sorted(per_class.items(), key=lambda entry: entry[1])[:most]
    return format_table([("class", "top-1"), *((name, f"{share:.4f}") for name, share in worst)])
