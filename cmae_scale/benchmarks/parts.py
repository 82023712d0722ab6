"""Parts of a step beside the usual way to write them and beside what bounds them, on one pinned thread.

Every part names our way first. The ways take turns, so that whatever else the machine does meets all of them;
what counts is the least CPU time of each. Ways that compute the same are compared before they are timed.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cmae_scale.augment import draw_views, make_views
from cmae_scale.augment.draws import step_generator
from cmae_scale.benchmarks.data_parts import prepare_decode, prepare_tar
from cmae_scale.benchmarks.start_parts import prepare_start
from cmae_scale.benchmarks.step_parts import prepare_engine, prepare_remat, prepare_step
from cmae_scale.benchmarks.timing import Part, Scale, Way, describe_part, time_part
from cmae_scale.checkpoints.commit import FileEntry, describe_file
from cmae_scale.checkpoints.files import write_rank_file
from cmae_scale.config.cmae import ViewsConfig
from cmae_scale.core.files import sync
from cmae_scale.engine.checkpoint.save_load import Snapshot
from cmae_scale.engine.ema import TargetEma
from cmae_scale.engine.process.group import start_processes, stop_processes
from cmae_scale.layers.attention import attend_explicitly


def prepare_ema(scale: Scale) -> Iterator[Part]:
    """The moving average of an encoder's weights: one call, a loop as the official hook's, a foreach pair."""
    block = nn.TransformerEncoderLayer(scale.embed_dim, 8, 4 * scale.embed_dim)
    shapes = [parameter.shape for parameter in block.parameters()] * scale.depth
    online = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    followed: list[Tensor] = list(online)
    targets = {
        name: [nn.Parameter(p.detach().clone(), requires_grad=False) for p in online] for name in "abc"
    }
    third: list[Tensor] = list(targets["c"])
    pairs = [(str(number), *both) for number, both in enumerate(zip(online, targets["a"], strict=True))]
    ema = TargetEma(pairs, keep_master=False, device=torch.device("cpu"))
    source, copied = (torch.zeros(sum(p.numel() for p in online)) for _ in "ab")

    @torch.no_grad()
    def loop() -> None:  # Source: official core/hooks/momentum_update_hook.py through cmae_model's update
        for old, new in zip(targets["b"], online, strict=True):
            old.data = old.data * 0.996 + new.data * (1 - 0.996)

    @torch.no_grad()
    def foreach() -> None:
        torch._foreach_mul_(third, 0.996)
        torch._foreach_add_(third, followed, alpha=1 - 0.996)

    with torch.no_grad():  # so that there is something to follow
        for parameter in online:
            parameter.add_(1.0)
    ways: dict[str, Way] = {
        "ours": lambda: ema.update_(0.996),
        "parameter by parameter": loop,
        "foreach multiply, then add": foreach,
        "a copy of as much (the limit)": lambda: copied.copy_(source),
    }
    for name in list(ways)[:3]:
        ways[name]()
    for other in "bc":
        for one, two in zip(targets["a"], targets[other], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    yield Part(ways, 1, "update")


def prepare_views(scale: Scale) -> Iterator[Part]:
    """Both views of uint8 masters: batched, and image by image as torchvision has it."""
    from torchvision.transforms import v2

    views = ViewsConfig(img_px=scale.img_px, master_px=scale.img_px + 32, shift_px=32)
    rng, side = torch.Generator().manual_seed(0), views.master_px
    images = torch.randint(0, 256, (scale.images, 1, 3, side, side), dtype=torch.uint8, generator=rng)
    numbers = draw_views(scale.images, views=views, rng=step_generator(0, step=0, purpose="views"))
    ops = views.color_ops
    flip, crop = v2.RandomHorizontalFlip(views.flip_p), v2.RandomCrop(views.img_px)
    color = v2.Compose(
        [
            v2.RandomApply(
                [v2.ColorJitter(ops.brightness, ops.contrast, ops.saturation, ops.hue)], ops.jitter_p
            ),
            v2.RandomGrayscale(ops.gray_p),
            v2.RandomApply([v2.GaussianBlur(13, ops.blur_sigma)], ops.blur_p),
        ]
    )
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(views.mean, views.std)])

    def one_by_one() -> None:
        for image in images[:, 0]:
            master = flip(image)
            finish(master[:, : views.img_px, : views.img_px])
            finish(color(crop(master)))

    outputs = torch.zeros(2, scale.images, 3, views.img_px, views.img_px)
    written = torch.zeros_like(outputs)
    yield Part(
        {
            "ours": lambda: make_views(images, numbers, views=views),
            "torchvision v2, image by image": one_by_one,
            "a copy of both views (the limit)": lambda: written.copy_(outputs),
        },
        scale.images,
        "image",
    )


def prepare_attention(scale: Scale) -> Iterator[Part]:
    """torch's fused attention beside plain products, forwards and backwards, where the model uses it."""
    for heads, tokens, width in ((12, 69, 64), (12, 197, 64), (16, 197, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            shape = (max(1, scale.images // 8), heads, tokens, width)
            inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]

            def run(attend: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> None:
                torch.autograd.grad(attend(*inputs).float().square().mean(), inputs)

            fused, plain = (
                attend(*(one.double() for one in inputs))
                for attend in (F.scaled_dot_product_attention, attend_explicitly)
            )
            torch.testing.assert_close(fused, plain)
            name = f"pass of {heads} heads of {width}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
            ways: dict[str, Way] = {
                "fused": lambda run=run: run(F.scaled_dot_product_attention),  # type: ignore[misc]
                "plain products": lambda run=run: run(attend_explicitly),  # type: ignore[misc]
            }
            yield Part(ways, shape[0], name)


def prepare_checkpoint(scale: Scale) -> Iterator[Part]:
    """A rank's file of a state: hashed while it is written, or read again for that; and copied in memory."""
    tensors = {
        f"weight/{number}@0": torch.randn(12 * scale.embed_dim**2)  # as many as a transformer block has
        for number in range(scale.depth)
    }
    snapshot = Snapshot()
    with TemporaryDirectory(dir=Path.cwd()) as folder:  # on the disk that runs are on, maybe not in memory
        path = Path(folder) / "rank.safetensors"

        def usual() -> FileEntry:
            save_file(tensors, path)
            sync(path)
            return describe_file(path)

        def hash_alone() -> list[str]:
            return [hashlib.sha256(tensor.numpy().data).hexdigest() for tensor in tensors.values()]

        assert write_rank_file(path, tensors) == usual()
        assert all(torch.equal(tensors[name], copy) for name, copy in snapshot.take(tensors).items())
        yield Part(
            {
                "ours": lambda: write_rank_file(path, tensors),
                "safetensors' writer, then hashed": usual,
                "a snapshot, where it is written beside training": lambda: snapshot.take(tensors),
                "hashing alone (the limit)": hash_alone,
            },
            max(1, round(sum(tensor.nbytes for tensor in tensors.values()) / 1e6)),
            "megabyte",
        )


GROUPED = ("step", "engine")  # where engines are made

PARTS: dict[str, Callable[[Scale], Iterator[Part]]] = {
    "ema": prepare_ema,
    "views": prepare_views,
    "attention": prepare_attention,
    "tar": prepare_tar,
    "checkpoint": prepare_checkpoint,
    "decode": prepare_decode,
    "step": prepare_step,
    "remat": prepare_remat,
    "engine": prepare_engine,
    "start": prepare_start,
}


def measure_parts(
    names: list[str], *, rounds: int, tell: Callable[[str], None], scale: Scale | None = None
) -> dict[str, Any]:
    """Timings of every way of the parts, by part and way; each part is told as it is done.

    Those with engines come last: processes that others start would take the group's place for their own.
    """
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        for name in sorted(names, key=GROUPED.__contains__):
            if name in GROUPED and not torch.distributed.is_initialized():
                start_processes()  # once, for DeepSpeed keeps a process's groups for ever
                stack.callback(stop_processes)
            torch.set_num_threads(1)
            for part in PARTS[name](Scale() if scale is None else scale):
                timings = time_part(part, rounds=rounds)
                tell(describe_part(name, part, timings))
                results[f"{name}, a {part.unit}"] = timings
    return results
