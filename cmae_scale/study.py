"""Compare encoders: pre-train each under the same conditions, evaluate all by the same tasks, one command.

Each cell is a run that could be started by hand, and is printed as such. The same command again skips what is
finished and goes on with what is not.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.config.run_file import find_run_file
from cmae_scale.config.study import StudyConfig, dump_study, read_study
from cmae_scale.core.cli import Parser, add_overrides, run_command
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.terminal import tell

HERE = Path(__file__).resolve().parent
EXAMPLES = """\
  python -m cmae_scale.study ds_configs/study/cifar.json
  python -m cmae_scale.study ds_configs/study/cifar.json --launcher "deepspeed --num_gpus 4"
  python -m cmae_scale.study ds_configs/study/cifar.json --set cmae.schedule.duration=100ep --out runs/long"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(study, argv)


def study(argv: Sequence[str] | None) -> None:
    """All cells that are not finished, then the comparison of all that are."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the study (ds_configs/study/*.json)")
    parser.add_argument("--out", metavar="DIR", help="folder of the study")
    add_overrides(
        parser, help="settings of the runs: cmae.* of pre-training, transfer.* of the tasks, others of all"
    )
    parser.add_argument("--launcher", default=sys.executable, help="what starts a run (python)")
    parser.add_argument("--report", action="store_true", help="start nothing, compare what is finished")
    args = parser.parse_args(argv)
    file = find_run_file(args.file)
    plan = read_study(file)
    out = Path(args.out or plan.out or f"runs/{file.stem}")

    from cmae_scale.tasks.study import plan_cells

    cells = plan_cells(plan, folder=file.parent, out=out, overrides=args.set)
    for number, cell in enumerate(cells, start=1):
        if cell.is_done or args.report:
            tell(f"[{number}/{len(cells)}] {cell.name}: {'finished' if cell.is_done else 'not finished'}")
            continue
        line = [*shlex.split(args.launcher), str(HERE / f"{cell.command}.py"), *cell.arguments]
        tell(f"[{number}/{len(cells)}] {cell.name}: {shlex.join(line)}")
        status = subprocess.run(line, check=False).returncode  # noqa: S603 -- the user's own command
        if status in (75, 130):  # asked to leave, and saved
            raise SystemExit(status)
        if status or not cell.is_done:
            raise ConfigError(
                f"{cell.name} ended with status {status}: see above; the same command goes on from there"
            )
    compare(plan, out)


def compare(plan: StudyConfig, out: Path) -> None:
    """study.json (a record), table, bars, and for trained tasks the curves over epochs."""
    from cmae_scale.core.files import write_text
    from cmae_scale.report.convergence import write_comparison, write_convergence
    from cmae_scale.report.records import write_record
    from cmae_scale.tasks.study import list_encoders, read_curve, read_overtakes, read_scores, tabulate_scores

    scores = read_scores(plan, out)
    results: dict[str, object] = {"top1": scores}
    table = tabulate_scores(scores)
    drawn = {}
    for task in plan.tasks:
        runs = {name: out / f"{task}_{name}" for name in list_encoders(plan)}
        curves = {name: read_curve(run) for name, run in runs.items() if (run / "metrics.jsonl").is_file()}
        if curves:
            drawn[task] = curves
            results[f"{task}_overtakes_at_epoch"] = read_overtakes(curves)
    write_record(out / "study.json", config=dump_study(plan), results=results)
    write_text(out / "table.txt", table + "\n")
    write_comparison(out / "comparison.png", scores=scores)
    for task, curves in drawn.items():
        write_convergence(out / f"convergence_{task}.png", curves=curves, title=f"{task}: top-1 by epoch")
    tell(f"\n{table}\n\n{out}/study.json, table.txt, comparison.png, convergence_*.png")


if __name__ == "__main__":
    sys.exit(main())
