"""The hybrid encoder on kept sites beside the same encoder on whole maps that are multiplied by the mask."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.sizes import COARSE, FINE
from cmae_scale.layers.tokens import TokenMask, mask_from_noise, patchify, take_tokens
from cmae_scale.models.build import build_encoder, init_transformer_
from cmae_scale.models.hybrid import HybridEncoder, place_sites
from cmae_scale.report.records import Timing

KEPT, WHOLE = "kept sites", "whole maps"


def benchmark_encoders(
    cfg: CmaeConfig, *, compute: torch.dtype, batch: int, rounds: int
) -> dict[str, list[Timing]]:
    """Seconds per image of forward and backward, interleaved, after a round that warms up.

    Matrix products are in `compute`. AssertionError if the two ways give other tokens (compared in fp32).
    """
    torch.manual_seed(0)
    encoder = build_encoder(cfg.model, img_px=cfg.views.img_px)
    assert isinstance(encoder, HybridEncoder)
    init_transformer_(encoder)
    images = torch.randn(batch, 3, cfg.views.img_px, cfg.views.img_px)
    noise = torch.rand(batch, (encoder.grid // cfg.mask.cell) ** 2)
    mask = mask_from_noise(noise, grid=encoder.grid, cell=cfg.mask.cell, ratio=cfg.mask.ratio)
    ways: dict[str, Callable[[], Tensor]] = {
        KEPT: partial(encoder, images, mask),
        WHOLE: partial(encode_whole_maps, encoder, images, mask),
    }
    with torch.no_grad():
        torch.testing.assert_close(ways[WHOLE](), ways[KEPT](), rtol=1e-4, atol=1e-4)
    timings: dict[str, list[Timing]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            timing = _time(way, compute)
            if number > 0:
                timings[name].append(Timing(timing.cpu_s / batch, timing.wall_s / batch))
    return timings


def encode_whole_maps(encoder: HybridEncoder, images: Tensor, mask: TokenMask) -> Tensor:
    """What `encoder` gives, by computing hidden places too, as ConvMAE does it."""
    everything = torch.arange(encoder.grid**2).expand(len(images), -1)
    visible = torch.zeros(len(images), encoder.grid**2).scatter(1, mask.kept, 1.0)
    maps = visible.view(-1, 1, encoder.grid, encoder.grid)
    fine_places, coarse_places = (place_sites(everything, grid=encoder.grid, side=s) for s in (FINE, COARSE))
    fine = encoder.patch_embed1(fine_places.take(patchify(images, encoder.patch_size // FINE)))
    for block in encoder.blocks1:
        fine = _run_masked(
            block, fine, fine_places, maps.repeat_interleave(FINE, 2).repeat_interleave(FINE, 3)
        )
    coarse = encoder.patch_embed2(fine)
    seen = maps.repeat_interleave(COARSE, 2).repeat_interleave(COARSE, 3)
    for block in encoder.blocks2:
        coarse = _run_masked(block, coarse, coarse_places, seen)
    tokens = encoder.patch_embed4(encoder.patch_embed3(coarse)) + encoder.pos_embed
    tokens = take_tokens(tokens, mask.kept).to(encoder.patch_embed4.weight.dtype)
    for block in encoder.blocks3:
        tokens = block(tokens)
    fused = take_tokens(encoder.stage1_output_decode(fine) + encoder.stage2_output_decode(coarse), mask.kept)
    normed: Tensor = encoder.norm(tokens + fused)
    return normed


def _run_masked(block: nn.Module, sites: Tensor, places: object, visible: Tensor) -> Tensor:
    """The block with hidden places set to zero before its depthwise convolution."""
    convolution = block.attn
    assert isinstance(convolution, nn.Module)
    hook = convolution.register_forward_pre_hook(lambda _, inputs: (inputs[0] * visible.to(inputs[0].dtype),))
    try:
        output: Tensor = block(sites, places)
    finally:
        hook.remove()
    return output


def _time(way: Callable[[], Tensor], compute: torch.dtype) -> Timing:
    is_low = compute is not torch.float32
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    with torch.autocast("cpu", dtype=compute if is_low else None, enabled=is_low):
        tokens = way()
    torch.autograd.backward(tokens.float().square().mean())
    return Timing(time.process_time() - cpu_s, time.perf_counter() - wall_s)
