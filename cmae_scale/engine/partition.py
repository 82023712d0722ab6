"""ZeRO-3 from the first value on: no rank ever holds more than its shards and one module."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from cmae_scale.checkpoints.newest import has_begun
from cmae_scale.config.run_file import Run
from cmae_scale.core.collectives import gather_objects
from cmae_scale.engine.remat import adapt_settings
from cmae_scale.engine.start import check_settings
from cmae_scale.engine.zero.checks import check_memory_plan
from cmae_scale.engine.zero.partitions import drop_node_copies_, partition_of
from cmae_scale.models import CMAE, build_cmae
from cmae_scale.models.initial import start_from_


def build_model(run: Run, *, device: torch.device) -> tuple[CMAE, list[str]]:
    """The model of a run as it starts, and where its weights are from; under ZeRO-3 already split over ranks.

    `run` is resolved and the process group is up. The weights are drawn on the CPU and equal those of a
    model built whole, to the bit, whatever the device. One that starts from a file is built whole; a run that
    has begun already has no need of the file.
    """
    init = None if gather_objects(has_begun(run))[0] else run.cmae.model.init
    if init is not None or run.deepspeed.get("zero_optimization", {}).get("stage", 0) != 3:
        whole = build_cmae(run.cmae)
        return whole, [] if init is None else start_from_(whole, run.cmae, path=Path(init))
    settings = adapt_settings(run.cmae.model.remat, settings=run.deepspeed)
    check_settings(settings, run)
    check_memory_plan(settings, device=device.type, has_target=run.cmae.has_contrast)
    model = build_cmae(run.cmae, on_init=Splitter(settings).split_)
    with torch.no_grad():
        for pair in model.target_pairs():
            partition_of(pair.target).copy_(partition_of(pair.online))
    drop_node_copies_(pair.target for pair in model.target_pairs())
    for buffer in model.buffers():  # DeepSpeed moves nothing of a model that comes in shards
        buffer.data = buffer.data.to(device)
    return model, []


class Splitter:
    """Splits module after module, as DeepSpeed splits a whole model at `deepspeed.initialize`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._first: Any = None  # any split parameter: it knows how to split others

    def split_(self, module: nn.Module) -> None:
        """Keep this rank's shard of the parameters that `module` itself holds. All ranks call it together."""
        own = list(module.parameters(recurse=False))
        if not own:
            return
        for parameter in own:
            parameter.data = parameter.data.to(self._dtype())
        if self._first is None:
            deepspeed.zero.Init(module=nn.ParameterList(own), config_dict_or_path=self._settings)
            self._first = own[0]
        else:
            self._first.convert_to_zero_parameters(param_list=own)

    def _dtype(self) -> torch.dtype:
        if self._settings.get("bf16", {}).get("enabled", False):
            return torch.bfloat16
        return torch.float16 if self._settings.get("fp16", {}).get("enabled", False) else torch.float32
