"""The whole training loop with DeepSpeed's engine on a GPU and among ranks that are not there.

Only in a process of its own (see `on_ranks`): DeepSpeed keeps groups and its accelerator for ever.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.run_file import Run
from cmae_scale.config.schedules import TargetMomentum, Timetable, WarmupCosine
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.stream import CropBatch
from cmae_scale.models import CMAE
from cmae_scale.models.build import keep_whole
from tests.fakes.gpu import CUDA, FakeGpu, fake_gpu
from tests.fakes.ranks import FakeRanks, fake_ranks

NEVER = 10**6


class FakeTraining:
    """A run under way; `take(step)` is a step of the loop, with what comes before and after it."""

    def __init__(self, run: Run, gpu: FakeGpu, ranks: FakeRanks, *, log_every: int = NEVER) -> None:
        from cmae_scale.core.world import World
        from cmae_scale.engine.loop import Trainer, open_logger
        from cmae_scale.engine.pretraining import Pretraining
        from cmae_scale.engine.process.group import RankContext
        from cmae_scale.engine.setup import start_pretraining, watch_health

        self.run, self.gpu, self.ranks = run, gpu, ranks
        self.batch = plan_batch(run.deepspeed, ranks=2)
        run.settings.monitor.__dict__["log_every"] = log_every
        context = RankContext(World(0, 2, 0), CUDA)
        self.state = start_pretraining(run, context=context, data_order="fake")
        momentum = TargetMomentum(run.cmae.target.momentum, total_steps=NEVER)
        self.task = Pretraining(self.state, self.batch, momentum, watch_health(self.state))
        self.logger = open_logger(self.task, times=Timetable(NEVER, NEVER, 1, NEVER))
        lr, bad = WarmupCosine(1e-3, NEVER, 1), BadSamples(1.0)
        self.trainer = Trainer(self.task, self.logger, lr=lr, bad=bad, end=NEVER, evaluation=None)
        self._steps = self.logger.watch(range(NEVER))

    def take(self) -> int:
        """The next step; its number."""
        step = next(self._steps)
        with self.state.use_attention():
            assert self.trainer.take(step, self._images(step))
        assert self.state.engine.was_step_applied() != self.gpu.flags
        return step

    def _images(self, step: int) -> Iterator[CropBatch]:
        views = self.run.cmae.views
        shape = (self.batch.micro, 1 + (views.target_crop == "random"), 3, views.master_px, views.master_px)
        for micro in range(self.batch.accumulation):
            images = torch.randint(0, 256, shape, dtype=torch.uint8)
            labels = torch.zeros(self.batch.micro, dtype=torch.int64)
            yield CropBatch(images, labels, ("key",) * self.batch.micro, step, micro)


@contextmanager
def fake_training(run: Run, **options: Any) -> Iterator[FakeTraining]:
    """The run, as the first of two ranks. See FakeTraining."""
    import deepspeed
    import deepspeed.accelerator.real_accelerator as chosen
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3

    from cmae_scale.engine.zero import start

    with ExitStack() as stack:
        gpu = stack.enter_context(fake_gpu())
        stack.enter_context(patch.object(chosen, "ds_accelerator", CUDA_Accelerator()))
        ranks = stack.enter_context(fake_ranks(gpu))
        stack.enter_context(patch.object(start, "build_cmae", build_without_values))
        for module in (partition_parameters, partitioned_param_coordinator, stage3):
            # it asks other ranks for numbers, which are made up
            stack.enter_context(patch.object(module, "assert_ints_same_as_other_ranks", lambda numbers: None))
        deepspeed.init_distributed(dist_backend="nccl", verbose=False)
        yield FakeTraining(run, gpu, ranks, **options)


def build_without_values(cfg: CmaeConfig, *, on_init: Callable[[nn.Module], None] = keep_whole) -> CMAE:
    """In the place of `build_cmae`: on the GPU from the start."""
    with CUDA:
        model = CMAE(cfg, mask=cfg.mask)
    model.to(CUDA)
    for module in model.modules():
        on_init(module)
    return model
