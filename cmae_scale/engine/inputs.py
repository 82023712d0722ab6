"""From the loader's images to what a forward pass sees: the views and mask noise of its rows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cmae_scale.augment import ViewNumbers, draw_views, make_views, online_view
from cmae_scale.core.draws import step_generator
from cmae_scale.core.settings import CmaeConfig
from cmae_scale.engine.step import MicroBatch


@dataclass(frozen=True)
class StepDraws:
    """All random numbers of one step's global batch.

    Every rank draws all of them and uses its own rows, so that views and masks do not depend on the number of
    ranks or micro-batches.
    """

    numbers: ViewNumbers
    noise: Float[Tensor, "total cells"]
    target_noise: Float[Tensor, "total cells"]

    def prepare(
        self, images: UInt8[Tensor, "batch crops 3 side side"], *, first_row: int, cfg: CmaeConfig
    ) -> MicroBatch:
        """The micro-batch made of `images`, which begin at row `first_row` of the global batch."""
        count, device = len(images), images.device
        numbers = self.numbers.rows(first_row, count)
        if cfg.has_contrast:
            views = make_views(images, numbers, views=cfg.views)
            online, target = views.online, views.target
        else:
            online = online_view(images, numbers, views=cfg.views)
            target = online
        rows = slice(first_row, first_row + count)
        return MicroBatch(
            online=online,
            target=target,
            noise=self.noise[rows].to(device, non_blocking=True),
            target_noise=self.target_noise[rows].to(device, non_blocking=True),
        )


def draw_step(cfg: CmaeConfig, *, total: int, step: int) -> StepDraws:
    """The random numbers of optimizer step `step` for a global batch of `total` images."""
    cells = (cfg.views.img_px // cfg.model.patch_size // cfg.mask.cell) ** 2
    return StepDraws(
        numbers=draw_views(total, views=cfg.views, rng=step_generator(cfg.seed, step=step, purpose="views")),
        noise=torch.rand(total, cells, generator=step_generator(cfg.seed, step=step, purpose="mask")),
        target_noise=torch.rand(
            total, cells, generator=step_generator(cfg.seed, step=step, purpose="target mask")
        ),
    )
