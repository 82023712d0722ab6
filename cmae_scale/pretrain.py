"""Pre-train a vision encoder as a contrastive masked autoencoder, as one run file says.

Each step, in the order of `train`: the plan says which samples; the loader decodes them to uint8 crops;
on the device they become an online view and a shifted, coloured target view; the online branch predicts the
pixels of the hidden patches and a query, the target branch a key; after the update the target follows.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.run_file import Run, read_run, resolve_run
from cmae_scale.config.schedules import Clock, plan_schedules, plan_timetable
from cmae_scale.core.cli import build_parser, read_overrides, run_command
from cmae_scale.core.world import read_world, wait_without_spinning
from cmae_scale.engine.process.signals import StopRequest
from cmae_scale.planning.advice import check_run, find_run_faults

if TYPE_CHECKING:
    from cmae_scale.data.shard_set import ShardSet
    from cmae_scale.data.stream import CropBatch
    from cmae_scale.engine.metrics.logger import MetricsLogger
    from cmae_scale.engine.pretraining import Pretraining
    from cmae_scale.engine.process.group import RankContext

EXAMPLES = """\
  deepspeed cmae_scale/pretrain.py --deepspeed_config ds_configs/quickstart.json
  deepspeed --num_gpus 2 cmae_scale/pretrain.py --deepspeed_config ds_configs/vits.json \\
      --set cmae.data.shards=shards/imagenette zero_optimization.stage=2 --out runs/imagenette
  python -m cmae_scale.pretrain --deepspeed_config ds_configs/quickstart.json --stop_at 20
the same command again goes on from the newest checkpoint in the run folder"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(pretrain, argv)


def pretrain(argv: Sequence[str] | None) -> None:
    """Read what to do before torch and DeepSpeed take their seconds to load: a typo is told at once."""
    parser = build_parser(__doc__.splitlines()[0], examples=EXAMPLES)
    parser.add_argument("--stop_at", type=int, metavar="STEP", help="save and end after this step")
    parser.add_argument(
        "--export_only", action="store_true", help="write RUN/encoder from the newest checkpoint, and end"
    )
    args = parser.parse_args(argv)
    wait_without_spinning()
    with StopRequest() as stop:
        run = read_run(args.deepspeed_config, read_overrides(args))
        if args.export_only:
            from cmae_scale.tasks.export import export_newest

            export_newest(run)
            return
        check_run(run, ranks=read_world().size)
        from cmae_scale.engine.process.lifecycle import run_context

        with run_context(run, stop) as context:
            train(run, context, stop_at=args.stop_at)


def train(run: Run, context: "RankContext", *, stop_at: int | None = None) -> None:
    """The run on this rank: to its end, with an exported encoder, or to `stop_at`, with a checkpoint."""
    from cmae_scale.core.collectives import find_together
    from cmae_scale.data.decoding import BadSamples
    from cmae_scale.data.mix import plan_data
    from cmae_scale.data.shard_set import ShardSet, open_shards
    from cmae_scale.data.stream import open_batches
    from cmae_scale.engine.loop import open_logger, take_steps
    from cmae_scale.engine.pretraining import Pretraining
    from cmae_scale.engine.setup import describe, start_pretraining, watch_health
    from cmae_scale.tasks.knn_monitor import open_knn_monitor

    rank, ranks = context.world.rank, context.world.size
    data = run.cmae.data
    open_ = partial(open_shards, data=data, measure=context.world.is_first_of_node)
    shards = find_together(lambda: open_(data.shards), fingerprint=ShardSet.fingerprint)
    held_out = shards
    if val_shards := data.val_shards:
        held_out = find_together(lambda: open_(val_shards), fingerprint=ShardSet.fingerprint)
    batch = plan_batch(run.deepspeed, ranks=ranks)
    plan = plan_data(shards, data, global_batch=batch.total, seed=run.cmae.seed)
    times = plan_timetable(run.cmae, steps_per_epoch=plan.steps_per_epoch, batch_samples=batch.total)
    run = resolve_run(run, batch=batch, total_steps=times.total_steps, warmup_steps=times.warmup_steps)
    schedules = plan_schedules(run.cmae, peak_lr=run.peak_lr, times=times)

    state = start_pretraining(run, context=context, data_order=plan.describe())
    task = Pretraining(state, batch, schedules.momentum, watch_health(state))
    logger = open_logger(task, times=times)
    logger.say(describe(state, images=shards.total, times=times))
    for fault in find_run_faults(run, batch=batch, ranks=ranks, times=times):
        logger.say(f"warning: {fault}")
    steps = range(state.first_step, min(times.total_steps, stop_at or times.total_steps))
    knn = open_knn_monitor(
        run.cmae,
        gather=task.gather_encoder,
        world=context.world,
        device=context.device,
        compute=state.compute,
        attention=state.attention["online_encoder"],
        clock=Clock(plan.steps_per_epoch, batch.total, times.total_steps),
    )
    bad = BadSamples(data.max_bad_fraction)

    @contextmanager
    def feed(steps: range) -> Iterator[Iterator["CropBatch"]]:
        loader = open_batches(
            shards,
            plan,
            views=run.cmae.views,
            data=data,
            rank=rank,
            ranks=ranks,
            accumulation=batch.accumulation,
            first_step=steps.start,
            end_step=steps.stop,
            pin=context.device.type == "cuda",
            bad=bad,
        )
        with loader:
            yield loader

    take_steps(task, logger, feed, steps=steps, lr=schedules.lr, bad=bad, evaluation=knn)
    if steps.stop == times.total_steps:
        finish(task, logger, held_out=held_out)
    logger.close()


def finish(task: "Pretraining", logger: "MetricsLogger", *, held_out: "ShardSet") -> None:
    """What a finished run leaves for people and for the next tool: pictures, encoder, summary."""
    from cmae_scale.data.ordered import read_held_out
    from cmae_scale.engine.inputs import preview
    from cmae_scale.engine.process.heartbeat import PATIENT
    from cmae_scale.models.weights import say_how_to_load
    from cmae_scale.report import read_metrics, write_curves, write_reconstructions

    state = task.state
    state.context.heartbeat.enter("finishing", step=logger.times.total_steps, patience=PATIENT)
    run, cfg = state.run, state.run.cmae
    encoder, pictures = task.export(logger.last), run.out / "pictures"
    how = say_how_to_load(cfg.model, folder=encoder)
    if cfg.monitor.pictures:
        crops, _ = read_held_out(
            held_out, count=cfg.monitor.pictures, views=cfg.views, max_mpx=cfg.data.max_image_mpx
        )
        sheet = preview(state.engine, crops.to(state.context.device), cfg=cfg)
        if state.context.world.is_first:
            write_reconstructions(pictures / "reconstructions.png", **vars(sheet))
    if state.context.world.is_first:
        chance = math.log(run.deepspeed["train_batch_size"]) if cfg.loss.contrast == "infonce" else None
        write_curves(pictures / "curves.png", metrics=read_metrics(logger.path), chance=chance)
        logger.say(f"{logger.summarise()}\nencoder {encoder} ({how}), pictures {pictures}")


if __name__ == "__main__":
    sys.exit(main())
