"""Draw the validation accuracy of several fine-tuning runs against epochs, as the paper's figure 4b."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.core.cli import Parser, run_command
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.terminal import tell

EXAMPLES = """\
  python -m cmae_scale.compare CMAE=runs/finetune_cmae MAE=runs/finetune_mae --out convergence.png"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(compare, argv)


def compare(argv: Sequence[str] | None) -> None:
    """The picture, and a table of when each run passes the others' final accuracy."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="run folders of cmae_scale.transfer")
    parser.add_argument("--out", type=Path, default=Path("convergence.png"), metavar="FILE")
    args = parser.parse_args(argv)
    folders = name_folders(args.runs)

    from cmae_scale.report.convergence import write_convergence
    from cmae_scale.tasks.results import format_table
    from cmae_scale.tasks.study import read_curve, read_overtakes

    curves = {name: read_curve(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        if not curves[name]:
            raise ConfigError(f"{folder} has not been validated yet: let it run through an epoch first")
    write_convergence(args.out, curves=curves)
    passes = read_overtakes(curves)
    rows = [("run", "epochs", "final top-1", *(f"passes {name} at" for name in curves))]
    for name, curve in curves.items():
        epoch, final = curve[-1]
        at = [passes[name].get(other) for other in curves]
        cells = ("-" if when is None else f"epoch {when:g}" for when in at)
        rows.append((name, f"{epoch:g}", f"{final:.4f}", *cells))
    tell(f"{format_table(rows)}\n{args.out}")


def name_folders(runs: Sequence[str]) -> dict[str, Path]:
    """Run folders by their names in the picture. ConfigError for a name without a folder, or with two."""
    folders: dict[str, Path] = {}
    for run in runs:
        name, _, folder = run.partition("=")
        if not name or not folder:
            raise ConfigError(f'"{run}": write NAME=RUN, for instance CMAE=runs/finetune_vitb')
        if name in folders:
            raise ConfigError(f'"{name}" names both {folders[name]} and {folder}: give each run its own name')
        folders[name] = Path(folder)
    return folders


if __name__ == "__main__":
    sys.exit(main())
