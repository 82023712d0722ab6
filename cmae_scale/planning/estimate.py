"""How long a run takes and what it costs, from its operations and a share of the hardware's peak."""

from typing import NamedTuple

from cmae_scale.config.cmae import CmaeConfig, Remat
from cmae_scale.config.schedules import Timetable
from cmae_scale.planning.layouts import REPEATED
from cmae_scale.sizing.flops import count_flops

# Source: ViT-B training with its data on H100s, 228 of 989 TFLOP/s (NVIDIA-BioNeMo/nvSubquadratic); ViT-g
# 29 % (NeMo). Not measured with this project: say what you see with --mfu.
DEFAULT_MFU = 0.25


class Estimate(NamedTuple):
    """The run as amounts. Time and cost are None where no speed, or no price, is assumed."""

    steps: int
    epochs: float
    images: int
    flops: int  # that had to be done, not those done again
    images_per_s: float | None
    hours: float | None
    gpu_hours: float | None
    gpu_s_per_1000_images: float | None
    cost: float | None
    cost_per_1000_images: float | None


def estimate_run(
    cfg: CmaeConfig,
    times: Timetable,
    *,
    batch: int,
    ranks: int,
    peak_flops: float | None,
    mfu: float,
    remat: Remat,
    price: float | None,
) -> Estimate:
    """The whole run on `ranks` GPUs of `peak_flops` each, at `price` per GPU-hour.

    Utilisation counts what had to be computed, so recomputation makes the run longer at the same `mfu`.
    """
    per_image, images = count_flops(cfg).training, times.total_steps * batch
    gpu_s = None
    if peak_flops is not None:
        gpu_s = 1000 * per_image * REPEATED[remat] / (peak_flops * mfu)
    gpu_hours = None if gpu_s is None else gpu_s * images / 1000 / 3600
    return Estimate(
        steps=times.total_steps,
        epochs=times.total_steps / times.steps_per_epoch,
        images=images,
        flops=per_image * images,
        images_per_s=None if gpu_s is None else 1000 * ranks / gpu_s,
        hours=None if gpu_hours is None else gpu_hours / ranks,
        gpu_hours=gpu_hours,
        gpu_s_per_1000_images=gpu_s,
        cost=None if price is None or gpu_hours is None else price * gpu_hours,
        cost_per_1000_images=None if price is None or gpu_s is None else price * gpu_s / 3600,
    )
