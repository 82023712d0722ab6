"""Views by Triton kernels beside those of plain PyTorch: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CODE = """
import itertools
import sys

import torch

from cmae_scale.augment import draw_views, make_views
from cmae_scale.config.cmae import ViewsConfig

device, first = sys.argv[1], int(sys.argv[2])
ALL = {"jitter_p": 1.0, "gray_p": 0.5, "blur_p": 0.5}
NONE = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0}
sizes = [(16, 20, 5), (33, 40, 8)] if device == "cpu" else [(96, 120, 25), (224, 256, 32)]
crops = ["shift", "random"]
for (side, master, shift), crop, ops in itertools.product(sizes, crops, [ALL, {}, NONE]):
    shift = shift if crop == "shift" else 0
    views = ViewsConfig.model_validate(
        dict(img_px=side, master_px=master, shift_px=shift, target_crop=crop, color_ops=ops), strict=False
    )
    rng = torch.Generator().manual_seed(first + side)
    numbers = draw_views(9, views=views, rng=rng)
    shape = (9, 2 if crop == "random" else 1, 3, master, master)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    images[0] = 77  # grey: no hue
    images[1, :, 1:] = 0  # one channel alone
    beside = (torch.arange(9.0), torch.arange(3))
    plain = make_views(images, numbers, views=views, beside=beside)
    ours = make_views(images.to(device), numbers, views=views, beside=beside, is_fused=True)
    again = make_views(images.to(device), numbers, views=views, beside=beside, is_fused=True)
    for one, other, repeated in zip(plain[:2], ours[:2], again[:2]):
        torch.testing.assert_close(other.cpu(), one, rtol=0, atol=3e-5)
        assert torch.equal(other, repeated)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours.beside, beside))
    only = make_views(images.to(device), numbers, views=views, target=False, is_fused=True)
    assert only.target is None and torch.equal(only.online, ours.online)
print("equal")
"""


def compare(device: str, repository: Path, *, seed: int = 0, interpreted: bool) -> str:
    environ = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, device, str(seed)],
        cwd=repository,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or done.stderr[-2000:]


def test_kernels_give_the_views_of_plain_pytorch(repository: Path) -> None:
    pytest.importorskip("triton")
    assert compare("cpu", repository, interpreted=True) == "equal"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cmae_scale.augment import fused

POINTERS = dict(images="*u8", blurred="*i64")
POINTERS |= dict.fromkeys(("table", "online", "target", "sums", "between", "taps"), "*fp32")
kernels = {name: value for name, value in vars(fused).items() if isinstance(value, triton.JITFunction)}
count = 0
for name in ("_online", "_sum_gray", "_target", "_blur_rows", "_blur_columns"):
    kernel = kernels[name]
    constants = {arg: 64 for arg in kernel.arg_names if arg.isupper()}
    kinds = {arg: "fp32" for arg in kernel.arg_names if arg.endswith(("_mean", "_std"))}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {arg: kinds.get(arg, POINTERS.get(arg, "i32")) for arg in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert ".target sm_80" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    count += 1
print(count)
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    (tmp_path / "compile.py").write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, tmp_path / "compile.py"],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "5", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_runs_the_same_kernels(repository: Path) -> None:
    assert compare("cuda", repository, interpreted=False) == "equal"
