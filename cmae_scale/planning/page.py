"""The forecast as a page of plain text."""

from collections.abc import Iterable, Sequence

from cmae_scale.config.precision import read_formats
from cmae_scale.core.terminal import format_seconds
from cmae_scale.planning.forecast import Forecast
from cmae_scale.planning.layouts import REMATS, STAGES, Layout
from cmae_scale.sizing.messages import count_sent


def write_page(plan: Forecast) -> str:
    """Parts, run, time, the grid of choices, and what is wrong; every line stands by itself."""
    sections = [_head(plan), _parts(plan), _run(plan), _grid(plan), _verdict(plan), _talks(plan)]
    lines = [line for section in sections if section for line in [*section, ""]]
    return "\n".join(
        [*lines[:-1], *([""] if plan.warnings else []), *(f"warning: {w}" for w in plan.warnings)]
    )


def align(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """The rows with their columns under each other: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _head(plan: Forecast) -> list[str]:
    machine, model, formats = plan.machine, plan.run.cmae.model, read_formats(plan.run.deepspeed)
    size = model.encoder or f"ViT {model.embed_dim} wide, {model.depth} deep"
    speed = f", {machine.flops / 1e12:.0f} TFLOP/s {machine.format}" if machine.flops else ""
    method = "CMAE" if plan.run.cmae.has_contrast else "MAE"
    return [
        f"{plan.run.path}: {method} {size} on {machine.ranks} x {machine.name} "
        f"({machine.memory_gib:.1f} GiB{speed})",
        f"matrix products in {formats.compute}, weights in {formats.parameters}",
    ]


def _parts(plan: Forecast) -> list[str]:
    counts, flops = plan.parameters, plan.flops
    rows = [
        ["part", "parameters", "GFLOP forward per image"],
        ["online encoder", _millions(counts.online_encoder), f"{flops.online_encoder / 1e9:.2f}"],
        ["pixel decoder", _millions(counts.pixel_decoder), f"{flops.pixel_decoder / 1e9:.2f}"],
    ]
    if plan.run.cmae.has_contrast:
        heads = counts.projector + counts.predictor
        rows += [
            ["feature decoder", _millions(counts.feature_decoder), f"{flops.feature_decoder / 1e9:.2f}"],
            ["projector, predictor", _millions(heads), f"{flops.heads / 1e9:.2f}"],
            ["target (moving average)", _millions(counts.target), f"{flops.target / 1e9:.2f}"],
        ]
    rows.append(["trained; a training step", _millions(counts.trained), f"{flops.training / 1e9:.2f}"])
    return list(align(rows))


def _run(plan: Forecast) -> list[str]:
    batch, times, estimate = plan.batch, plan.times, plan.estimate
    lines = [
        f"run    {estimate.steps:,} steps, {estimate.epochs:.4g} epochs of {plan.dataset_images:,} images: "
        f"{estimate.images:,} images, {estimate.flops:.3g} FLOP",
        f"batch  {batch.total} = {batch.micro} micro-batch x {batch.accumulation} accumulation x "
        f"{plan.machine.ranks} ranks; peak lr {plan.run.peak_lr:.3g} after {times.warmup_steps:,} steps, "
        f"saved every {times.save_every_steps:,}",
    ]
    if estimate.hours is None or estimate.gpu_hours is None:
        return [*lines, f"time   not said: the speed of a {plan.machine.name} is not known (--tflops)"]
    lines.append(
        f"time   {format_seconds(3600 * estimate.hours)} at {plan.mfu:.0%} MFU (assumed; --mfu), "
        f"{estimate.images_per_s:,.0f} images/s, {estimate.gpu_hours:,.1f} GPU-hours, "
        f"{estimate.gpu_s_per_1000_images:.3g} GPU-seconds per 1000 images"
    )
    if estimate.cost is not None:
        lines.append(
            f"cost   {estimate.cost:,.2f} for the run, {estimate.cost_per_1000_images:.3g} per 1000 images"
        )
    return lines


def _grid(plan: Forecast) -> list[str]:
    rows = [["GiB per rank", *(f"remat {remat}" for remat in REMATS)]]
    for stage in STAGES:
        cells = [_cell(layout, plan=plan) for layout in plan.layouts if layout.stage == stage]
        rows.append([f"ZeRO {stage}", *cells])
    return [
        *align(rows),
        f"at micro-batch {plan.batch.micro} (! = does not fit, * = the run), then the largest micro-batch x "
        "accumulation that fits",
    ]


def _cell(layout: Layout, *, plan: Forecast) -> str:
    mark = ("*" if layout is plan.own else "") + ("" if layout.fits else "!")
    largest = layout.largest
    room = f"{largest.micro} x {largest.accumulation}" if largest else "none"
    return f"{mark}{layout.device_bytes / 2**30:.1f}  {room:>9}"


def _verdict(plan: Forecast) -> list[str]:
    own, peak = plan.own, plan.own.peak
    parts = [
        (name.replace("_", " "), size)
        for name, size in peak._asdict().items()
        if isinstance(size, int) and size
    ]
    beside = own.device_bytes - peak.total_bytes
    if beside:
        parts.append(("beside tensors", beside))
    lines = [
        f"the run: ZeRO {own.stage}, remat {own.remat}: {own.device_bytes / 2**30:.1f} GiB, "
        + ("fits" if own.fits else "DOES NOT FIT")
        + f"; fullest at {peak.name}",
        "         " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts),
    ]
    if own.host_bytes:
        lines.append(
            f"         and {own.host_bytes / 2**30:.1f} GiB of main memory per rank for what is offloaded"
        )
    ahead = plan.run.cmae.data.count_ahead(plan.batch.accumulation)
    lines.append(
        f"         and {plan.loaded_bytes / 2**30:.1f} GiB of main memory per rank for decoded images, "
        f"{ahead} micro-batches ahead"
    )
    if plan.snapshot_bytes:
        lines.append(
            f"         and {plan.snapshot_bytes / 2**30:.1f} GiB of main memory per rank for the checkpoint "
            "that is written beside training"
        )
    best = plan.recommended
    if best is not None and best.largest is not None:
        micro = best.largest if not best.fits else plan.batch
        lines.append(
            f"fastest that should fit: zero_optimization.stage={best.stage} cmae.model.remat={best.remat} "
            f"train_micro_batch_size_per_gpu={micro.micro} (accumulation {micro.accumulation})"
        )
    return lines


def _talks(plan: Forecast) -> list[str]:
    if not plan.talks:
        return []
    rows = [["between ranks", "MiB a rank sends", "collectives"]]
    for talk in plan.talks:
        sent = count_sent(talk, ranks=plan.machine.ranks) / 2**20
        rows.append([f"a {talk.when}: {talk.what}", f"{sent:.3g}", str(talk.calls or "by buckets")])
    reasons = ["", *(talk.reason for talk in plan.talks)]
    return [f"{line}  {reason}".rstrip() for line, reason in zip(align(rows), reasons, strict=True)]


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
