"""Everything that is said of a run before it starts, in one value, and as JSON."""

from dataclasses import replace
from typing import Any, NamedTuple

from cmae_scale.config.batches import BatchSizes
from cmae_scale.config.precision import FormatName, is_left_to_machine, read_formats, write_autocast
from cmae_scale.config.run_file import Run
from cmae_scale.config.schedules import Timetable
from cmae_scale.planning.advice import find_faults
from cmae_scale.planning.estimate import Estimate, estimate_run
from cmae_scale.planning.layouts import Layout, on_device, plan_layouts, recommend
from cmae_scale.sizing.activations import Kernel
from cmae_scale.sizing.flops import ForwardFlops, count_flops
from cmae_scale.sizing.hardware import Gpu
from cmae_scale.sizing.memory import count_loaded
from cmae_scale.sizing.messages import Talk, count_sent, list_talks
from cmae_scale.sizing.parameters import ParameterCounts, count_parameters
from cmae_scale.sizing.zero import Device, Job, count_snapshot, is_optimizer_fused, read_zero


class Machine(NamedTuple):
    """`ranks` devices of one kind. `flops` is None where nobody has written the speed down, as of a CPU."""

    name: str
    device: Device
    ranks: int
    memory_gib: float  # of one
    flops: float | None
    format: FormatName  # of matrix products where a run file leaves it to the machine


class Forecast(NamedTuple):
    """What the page and the JSON say."""

    run: Run
    machine: Machine
    dataset_images: int
    batch: BatchSizes
    times: Timetable
    mfu: float
    parameters: ParameterCounts
    flops: ForwardFlops
    estimate: Estimate
    loaded_bytes: int  # of decoded images in main memory, per rank
    snapshot_bytes: int  # of the checkpoint that is written beside training, likewise
    layouts: list[Layout]
    own: Layout
    recommended: Layout | None
    talks: list[Talk]  # between ranks; none of a lone one
    warnings: list[str]


def name_machine(gpu: Gpu, *, ranks: int) -> Machine:
    """`ranks` of a listed GPU."""
    return Machine(gpu.name, "cuda", ranks, gpu.memory_gib, gpu.flops, gpu.half)


def assume_precision(run: Run, format: FormatName) -> Run:
    """The run as a machine decides that is best at `format`, if it is left to the machine."""
    if not is_left_to_machine(run.deepspeed):
        return run
    return replace(run, deepspeed=write_autocast(run.deepspeed, format))


def forecast(
    run: Run,
    *,
    machine: Machine,
    dataset_images: int,
    batch: BatchSizes,
    times: Timetable,
    mfu: float,
    price: float | None,
) -> Forecast:
    """All about a resolved run on a machine."""
    run = assume_precision(run, machine.format)
    job = describe_job(run, batch=batch, ranks=machine.ranks, device=machine.device)
    layouts = plan_layouts(job, capacity_bytes=machine.memory_gib * 2**30)
    remat = "full" if "activation_checkpointing" in run.deepspeed else run.cmae.model.remat
    own = next(layout for layout in layouts if (layout.stage, layout.remat) == (job.zero.stage, remat))
    estimate = estimate_run(
        run.cmae,
        times,
        batch=batch.total,
        ranks=machine.ranks,
        peak_flops=machine.flops,
        mfu=mfu,
        remat=remat,
        price=price,
    )
    return Forecast(
        run=run,
        machine=machine,
        dataset_images=dataset_images,
        batch=batch,
        times=times,
        mfu=mfu,
        parameters=count_parameters(run.cmae),
        flops=count_flops(run.cmae),
        estimate=estimate,
        loaded_bytes=count_loaded(job),
        snapshot_bytes=count_snapshot(job),
        layouts=layouts,
        own=own,
        recommended=recommend(layouts, ranks=machine.ranks),
        talks=list_talks(job),
        warnings=find_faults(
            run, job=job, times=times, layouts=layouts, own=own, machine_format=machine.format
        ),
    )


def describe_job(run: Run, *, batch: BatchSizes, ranks: int, device: Device) -> Job:
    """What decides a run's memory on a rank."""
    return Job(
        cfg=run.cmae,
        formats=read_formats(run.deepspeed),
        zero=read_zero(run.deepspeed, ranks=ranks),
        batch=batch,
        kernel=choose_kernel(run, device=device),
        device=device,
        is_fused=is_optimizer_fused(run.deepspeed),
    )


def choose_kernel(run: Run, *, device: Device) -> Kernel:
    """How attention will likely run: layers/attention.py tries it once there is a device."""
    setting = run.cmae.model.attention
    if setting in ("math", "explicit"):
        return setting
    is_coarse = read_formats(run.deepspeed).compute_bytes < 4
    return "explicit" if device == "cpu" and is_coarse and setting == "auto" else "fused"


def to_json(plan: Forecast) -> dict[str, Any]:
    """The forecast with the unit in every name."""
    return {
        "run_file": str(plan.run.path),
        "machine": plan.machine._asdict(),
        "dataset_images": plan.dataset_images,
        "batch": vars(plan.batch) | {"ranks": plan.machine.ranks},
        "schedule_steps": vars(plan.times),
        "peak_lr": plan.run.peak_lr,
        "parameters": plan.parameters._asdict()
        | {"trained": plan.parameters.trained, "target": plan.parameters.target},
        "forward_flops_per_image": plan.flops._asdict(),
        "training_flops_per_image": plan.flops.training,
        "assumed_mfu": plan.mfu,
        "outlook": plan.estimate._asdict(),
        "loaded_bytes": plan.loaded_bytes,
        "snapshot_bytes": plan.snapshot_bytes,
        "layouts": [_layout_json(layout, plan=plan) for layout in plan.layouts],
        "own": {"stage": plan.own.stage, "remat": plan.own.remat, "fits": plan.own.fits},
        "recommended": plan.recommended and _layout_json(plan.recommended, plan=plan),
        "between_ranks": [
            talk._asdict() | {"sent_bytes": count_sent(talk, ranks=plan.machine.ranks)} for talk in plan.talks
        ],
        "warnings": plan.warnings,
    }


def _layout_json(layout: Layout, *, plan: Forecast) -> dict[str, Any]:
    parts = layout.peak._asdict()
    moment = parts.pop("name")
    return {
        "stage": layout.stage,
        "remat": layout.remat,
        "fits": layout.fits,
        "device_bytes": layout.device_bytes,
        "host_bytes": layout.host_bytes,
        "fullest_moment": moment,
        "tensor_bytes": parts | {"total": layout.peak.total_bytes},
        "beside_tensors_bytes": on_device(layout.peak, device=plan.machine.device) - layout.peak.total_bytes,
        "largest_micro_batch": layout.largest and layout.largest.micro,
        "its_accumulation": layout.largest and layout.largest.accumulation,
    }
