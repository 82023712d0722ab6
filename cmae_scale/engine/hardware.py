"""What the hardware could do at most, to say how much of it a run uses."""

import torch

from cmae_scale.core.hardware import recognise_gpu


def read_peak_flops(device: torch.device) -> float | None:
    """Peak of the GPU `device`, or None for a CPU and for GPUs whose peak is not listed."""
    if device.type != "cuda":
        return None
    gpu = recognise_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.flops
