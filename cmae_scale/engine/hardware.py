"""What the hardware is, and could do at most."""

import torch

from cmae_scale.sizing.hardware import recognise_gpu


def name_device(device: torch.device) -> str:
    """The kind of processor, for instance "NVIDIA L4" or "CPU with AVX2"."""
    if device.type == "cuda":
        name: str = torch.cuda.get_device_name(device)
        return name
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def read_peak_flops(device: torch.device) -> float | None:
    """Peak of the GPU `device`, or None for a CPU and for GPUs whose peak is not listed."""
    if device.type != "cuda":
        return None
    gpu = recognise_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.flops
