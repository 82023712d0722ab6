"""What the hardware could do at most, to say how much of it a run uses."""

import torch

# Dense bf16 matrix products per second. Source: NVIDIA's data sheets (SXM parts), without sparsity.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}


def read_peak_flops(device: torch.device) -> float | None:
    """Peak of the GPU `device`, or None for a CPU and for GPUs whose peak is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK_FLOPS.items() if model in name), None)
