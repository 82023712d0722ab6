"""From the loader's images to what a forward pass sees, and a preview of what the model makes of it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cmae_scale.augment import ViewNumbers, denormalise, draw_views, make_views
from cmae_scale.augment.draws import step_generator
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.data.stream import CropBatch, copy_ahead
from cmae_scale.engine.metrics.step_timer import StepTimer
from cmae_scale.layers.tokens import patchify, take_tokens, unpatchify
from cmae_scale.losses import patch_statistics


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of this rank sees; a view that it does not ask for is None.

    Noise fixes the masks: see `CMAE.forward`. `first_row` is where it begins in the global batch.
    """

    online: Float[Tensor, "batch 3 side side"] | None
    target: Float[Tensor, "batch 3 side side"] | None
    noise: Float[Tensor, "batch cells"]
    target_noise: Float[Tensor, "batch cells"]
    first_row: int


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
        self,
        images: UInt8[Tensor, "batch crops 3 side side"],
        *,
        first_row: int,
        cfg: CmaeConfig,
        online: bool = True,
        target: bool = True,
    ) -> MicroBatch:
        """The micro-batch made of `images`, which begin at row `first_row` of the global batch.

        `online` and `target` say which views to make.
        """
        rows = slice(first_row, first_row + len(images))
        views = make_views(
            images,
            self.numbers.rows(first_row, len(images)),
            views=cfg.views,
            online=online,
            target=target,
            beside=(self.noise[rows], self.target_noise[rows]),
            is_fused=cfg.fused_views == "on",
        )
        noise, target_noise = views.beside
        return MicroBatch(views.online, views.target, noise, target_noise, first_row)


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


class DrawsAhead:
    """`draw_step`, one step ahead in a thread: for 4096 images it takes 40 ms, which no GPU should wait for.

    Steps may come in any order; the one after the last is at hand. What is drawn is the same in any case.
    """

    def __init__(self, cfg: CmaeConfig, *, total: int) -> None:
        self._draw = partial(draw_step, cfg, total=total)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draws")
        self._ahead: tuple[int, Future[StepDraws]] | None = None

    def take(self, step: int) -> StepDraws:
        """The random numbers of `step`; those of the next are begun."""
        ahead, self._ahead = self._ahead, (step + 1, self._thread.submit(self._draw, step=step + 1))
        return ahead[1].result() if ahead is not None and ahead[0] == step else self._draw(step=step)


@dataclass(frozen=True)
class StepImages:
    """A rank's images of one optimizer step; `first_row` is where they begin in the global batch.

    They stay where the loader put them. On the device are the views of the micro-batch that is being computed
    and, on a GPU, its images and the next ones: memory does not grow with accumulation.
    """

    crops: Sequence[CropBatch]
    draws: StepDraws
    first_row: int
    cfg: CmaeConfig
    has_target: bool  # a plain MAE has no target view
    device: torch.device
    timer: StepTimer

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.crops)

    def views(self, *, online: bool, target: bool) -> Iterator[MicroBatch]:
        """One micro-batch after the other with the views asked for, each made when its turn comes.

        They are the same however often and in whatever combination they are asked for. Nothing here holds on
        to a micro-batch, so consume them by `map`: the variable of a `for` keeps one while the next is made.
        """

        def prepare(part: CropBatch, first_row: int) -> MicroBatch:
            with self.timer.span("augment"):
                return self.draws.prepare(
                    part.images,
                    first_row=first_row,
                    cfg=self.cfg,
                    online=online,
                    target=target and self.has_target,
                )

        micro = len(self.crops[0].images)
        first_rows = range(self.first_row, self.first_row + micro * len(self), micro)
        return map(prepare, copy_ahead(self.crops, self.device), first_rows)


@dataclass(frozen=True)
class Preview:
    """Pictures in [0, 1] on the CPU, one row per image. `hidden` is 1 where the encoder saw nothing."""

    images: Float[Tensor, "batch 3 side side"]
    hidden: Float[Tensor, "batch 1 side side"]
    reconstructed: Float[Tensor, "batch 3 side side"]
    target: Float[Tensor, "batch 3 side side"] | None  # a plain MAE has no target view


@torch.no_grad()
def preview(engine: Any, masters: UInt8[Tensor, "batch 3 master master"], *, cfg: CmaeConfig) -> Preview:
    """Reconstructions of `masters`; every rank must call it with the same images.

    A model trained on normalised patches predicts their structure only: mean and deviation are the true ones,
    and visible patches are shown as they are. Source: MAE's visualisation.
    """
    crops = 2 if cfg.views.target_crop == "random" else 1
    images = masters[:, None].expand(-1, crops, -1, -1, -1)
    draws = draw_step(cfg, total=len(images), step=0)
    micro = draws.prepare(images, first_row=0, cfg=cfg, target=cfg.has_contrast)
    assert micro.online is not None
    engine.eval()
    with torch.compiler.set_stance("force_eager"):  # no other shape is worth compiling for
        output = engine(micro.online, None, noise=micro.noise)
    engine.train()
    patch = cfg.model.patch_size
    patches = patchify(micro.online, patch)
    true = take_tokens(patches, output.mask.hidden)
    predicted = output.pixels.float()
    if cfg.loss.norm_pix:
        mean, std = patch_statistics(true)
        predicted = predicted * std + mean
    everywhere = patches.scatter(1, output.mask.hidden[:, :, None].expand_as(predicted), predicted)
    blank = torch.zeros_like(patches).scatter(1, output.mask.hidden[:, :, None].expand_as(true), 1.0)
    return Preview(
        images=denormalise(micro.online, views=cfg.views).cpu(),
        hidden=unpatchify(blank, patch)[:, :1].cpu(),
        reconstructed=denormalise(unpatchify(everywhere, patch), views=cfg.views).cpu(),
        target=None if micro.target is None else denormalise(micro.target, views=cfg.views).cpu(),
    )
