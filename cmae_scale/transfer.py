"""Find out what an encoder has learned: nearest neighbours, linear probe, partial or full fine-tuning.

One run file says which. Training goes through the same loop, engine and states as pre-training: what differs
is the task, which makes inputs, targets and losses of a batch and judges the network on held-out images.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.run_file import Run, dump_run, read_run, resolve_run
from cmae_scale.config.schedules import Clock, plan_timetable, plan_transfer_lr, read_steps
from cmae_scale.core.cli import build_parser, read_overrides, run_command
from cmae_scale.core.credentials import write_settings
from cmae_scale.core.terminal import tell
from cmae_scale.core.world import read_world, wait_without_spinning
from cmae_scale.engine.process.signals import StopRequest
from cmae_scale.planning.advice import check_run, find_run_faults

if TYPE_CHECKING:
    from cmae_scale.data.stream import CropBatch
    from cmae_scale.engine.precision import Settled
    from cmae_scale.engine.process.group import RankContext
    from cmae_scale.tasks.build import TransferContext

EXAMPLES = """\
  python -m cmae_scale.transfer --deepspeed_config ds_configs/transfer/knn.json \\
      --set transfer.encoder.place=runs/vitb/encoder
  deepspeed cmae_scale/transfer.py --deepspeed_config ds_configs/transfer/linear_vitb.json \\
      --set transfer.task.linear.sweep=[0.3,1,3]
  deepspeed cmae_scale/transfer.py --deepspeed_config ds_configs/transfer/finetune_vitb.json \\
      --set transfer.encoder.place=runs/vitb/encoder transfer.data.train_fraction=0.1 --out runs/low_shot
the same command again goes on from the newest checkpoint in the run folder"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(transfer, argv)


def transfer(argv: Sequence[str] | None) -> None:
    """Read what to do before torch and DeepSpeed take their seconds to load: a typo is told at once."""
    parser = build_parser(__doc__.splitlines()[0], examples=EXAMPLES)
    parser.add_argument("--stop_at", type=int, metavar="STEP", help="save and end after this step")
    args = parser.parse_args(argv)
    wait_without_spinning()
    with StopRequest() as stop:
        run = read_run(args.deepspeed_config, read_overrides(args, kind="transfer"), kind="transfer")
        check_run(run, ranks=read_world().size)
        from cmae_scale.engine.precision import Product, read_precision, settle_arithmetic
        from cmae_scale.engine.process.lifecycle import run_context
        from cmae_scale.tasks.build import open_context

        with run_context(run, stop) as context:
            opened = open_context(run.transfer, world=context.world, device=context.device)
            settled = settle_arithmetic(
                run,
                device=context.device,
                product=Product(run.transfer.monitor.batch, *reversed(opened.widest)),
                attention=run.transfer.encoder.attention,
                shapes={"encoder": opened.attention_shape},
            )
            compute = read_precision(settled.run.deepspeed).compute
            opened = opened.compute_in(compute, settled.attention["encoder"])
            if context.world.is_first:
                tell("\n".join([*settled.notices, *opened.encoder.notices]))
            if run.transfer.task.knn is not None:
                find_neighbours(settled.run, opened)
            else:
                train(settled, opened, context=context, stop_at=args.stop_at)


def find_neighbours(run: Run, opened: "TransferContext") -> None:
    """Evaluator the encoder as it is: its features vote."""
    from cmae_scale.tasks.encode import encode_with
    from cmae_scale.tasks.results import tabulate, tabulate_classes, write_results
    from cmae_scale.tasks.validator import draw_confusion, write_predictions

    cfg, evaluator = run.transfer, opened.evaluator
    assert cfg.task.knn is not None
    run.out.mkdir(parents=True, exist_ok=True)
    encode = encode_with(opened.encoder, opened.preprocessor, img_px=cfg.crop.img_px, pool=cfg.task.knn.pool)
    result = evaluator.evaluate_knn(encode, cfg=cfg.task.knn, fraction=cfg.data.train_fraction)
    found = result.scores.as_metrics("knn", evaluator.labelled.classes)
    is_first = evaluator.world.is_first
    write_predictions(run.out, result, classes=evaluator.labelled.classes, is_first=is_first)
    if is_first:
        write_settings(run.out / "config.json", dump_run(run))
        write_results(run.out / "results.json", {"encoder": opened.encoder.place, "task": "knn", **found})
        draw_confusion(run.out, result, classes=evaluator.labelled.classes)
        tell(tabulate({f"knn, k={cfg.task.knn.k}": found}, prefix="knn"))
        tell(f"\n{tabulate_classes(found['knn_per_class'])}\nrun folder {run.out}")


def train(
    settled: "Settled",
    opened: "TransferContext",
    *,
    context: "RankContext",
    stop_at: int | None = None,
) -> None:
    """The run on this rank: to its end, with an exported model, or to `stop_at`, with a checkpoint."""
    from cmae_scale.data.decoding import BadSamples
    from cmae_scale.engine.loop import open_logger, take_steps
    from cmae_scale.engine.transfer import describe_transfer, start_transfer
    from cmae_scale.models.classifier import say_how_to_open
    from cmae_scale.report import read_metrics, write_curves
    from cmae_scale.tasks.build import build_task, open_training, plan_training
    from cmae_scale.tasks.results import tabulate, write_results
    from cmae_scale.tasks.validator import Validator

    run, cfg = settled.run, settled.run.transfer
    batch = plan_batch(run.deepspeed, ranks=context.world.size)
    plan = plan_training(opened, batch=batch)
    times = plan_timetable(cfg, steps_per_epoch=plan.steps_per_epoch, batch_samples=batch.total)
    run = resolve_run(run, batch=batch, total_steps=times.total_steps, warmup_steps=times.warmup_steps)
    lr = plan_transfer_lr(cfg.schedule, peak_lr=run.peak_lr, times=times)
    task = build_task(opened, batch=batch)
    ema = cfg.task.finetune.ema if cfg.task.finetune else 0.0

    training = start_transfer(
        settled._replace(run=run),
        context=context,
        task=task,
        batch=batch,
        data_order=plan.describe(),
        ema=ema,
    )
    state = training.state
    logger = open_logger(training, times=times)
    evaluator, clock = opened.evaluator, Clock(plan.steps_per_epoch, batch.total, times.total_steps)
    every = read_steps(cfg.monitor.evaluate_every, clock=clock, key="transfer.monitor.evaluate_every")
    validator = Validator(task, evaluator, training.gather, run.out, max(1, every), times.total_steps)
    validator.recall(logger.path)
    logger.say(
        describe_transfer(
            state, images=plan.total, held_out=evaluator.labelled.val.total, steps=times.total_steps
        )
    )
    for fault in find_run_faults(run, batch=batch, ranks=context.world.size, times=times):
        logger.say(f"warning: {fault}")
    steps = range(state.first_step, min(times.total_steps, stop_at or times.total_steps))
    bad = BadSamples(cfg.data.max_bad_fraction)

    @contextmanager
    def feed(steps: range) -> Iterator[Iterator["CropBatch"]]:
        with open_training(opened, task, plan, batch=batch, steps=steps, bad=bad) as loader:
            yield loader

    take_steps(training, logger, feed, steps=steps, lr=lr, bad=bad, evaluation=validator)
    if steps.stop == times.total_steps and context.world.is_first:
        scores = {"best": validator.best or {}, "last": validator.last or {}}
        about = {"encoder": opened.encoder.place, "task": cfg.task.name, "train_images": plan.total}
        write_results(run.out / "results.json", {**about, "classes": evaluator.labelled.classes, **scores})
        write_curves(run.out / "curves.png", metrics=read_metrics(logger.path))
        logger.say(f"{logger.summarise()}\n{tabulate(scores, prefix='val')}")
        logger.say(f"model {run.out / 'model'} ({say_how_to_open(opened.encoder, run.out / 'model')})")
    logger.close()


if __name__ == "__main__":
    sys.exit(main())
