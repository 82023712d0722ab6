"""The step of the shipped sizes on a GPU that is not there: views, branches, losses, backward, average."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmae_scale.augment import denormalise
from cmae_scale.benchmarks.noise import BareEngine as PlainEngine
from cmae_scale.benchmarks.noise import Size, Stage, make_noise, read_noise_run
from cmae_scale.config.batches import plan_batch
from cmae_scale.config.run_file import Run
from cmae_scale.engine.ema import TargetEma
from cmae_scale.engine.inputs import StepImages, draw_step, preview
from cmae_scale.engine.metrics.health import Health
from cmae_scale.engine.metrics.step_timer import StepTimer
from cmae_scale.engine.pretraining import accumulate_gradients
from cmae_scale.engine.zero.partitions import gather_weights
from cmae_scale.models import CMAE
from tests.fakes.engine import build_without_values
from tests.fakes.gpu import CUDA, FakeGpu, fake_gpu

CONTRASTS = {
    "none": ("cmae.loss.weight=0",),
    "byol": ("cmae.loss.contrast=byol",),
    "infonce": ("cmae.loss.contrast=infonce",),
}
CROPS = {"shift": (), "random": ("cmae.views.target_crop=random", "cmae.views.shift_px=0")}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": None}
SIZES = ["vits", "vitb", "vitl", "convvitb"]
GRID = list(product(SIZES, CONTRASTS, CROPS, (1, 2), PRECISIONS))


def read(run_file: str, changes: tuple[str, ...], accumulation: int, tmp_path: Path) -> Run:
    size = Size(run_file, 4, (*changes, "cmae.model.attention=math"), accumulation)
    return read_noise_run(size, Stage("cuda", is_quick=True, scratch=str(tmp_path)))


class BareEngine(PlainEngine):
    """With what a log line and pictures ask of an engine too."""

    optimizer = None

    def eval(self) -> None:
        self.model.eval()

    def train(self) -> None:
        self.model.train()


class Pass:
    """A step of a bare model, with everything that a log line asks of it."""

    def __init__(self, run: Run, autocast: torch.dtype | None) -> None:
        self.run = run
        self.model: CMAE = build_without_values(run.cmae)
        self.engine = BareEngine(self.model, CUDA, autocast)
        self.ema = TargetEma(self.model.target_pairs(), keep_master=False, device=CUDA)
        distance = self.ema.measure_distance if self.ema.target else None
        parts = {"encoder": list(self.model.online_encoder.parameters())}
        self.health = Health(parts, distance=distance, chance=None)

    def take(self) -> Tensor:
        batch = plan_batch(self.run.deepspeed, ranks=1)
        images = StepImages(
            make_noise(self.run, batch, step=0, pin=False),
            draw_step(self.run.cmae, total=batch.total, step=0),
            first_row=0,
            cfg=self.run.cmae,
            has_target=self.run.cmae.has_contrast,
            device=CUDA,
            timer=StepTimer(CUDA, is_on=True),
        )
        self.health.is_due = True
        losses = accumulate_gradients(self.engine, images, health=self.health)
        self.health.look_at_gradients(self.engine)
        self.ema.update_(0.99)
        return losses


@pytest.fixture
def gpu(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.chdir(repository)
    with fake_gpu() as gpu:
        yield gpu


@pytest.mark.slow_unless(run_file="vits", contrast="infonce", crop="random", accumulation=2)
@pytest.mark.slow_unless(run_file="vits", contrast="none", crop="shift", accumulation=1, precision="fp32")
@pytest.mark.slow_unless(run_file="vitb", contrast="byol", crop="random", accumulation=1, precision="bf16")
@pytest.mark.slow_unless(run_file="vitl", contrast="infonce", crop="shift", accumulation=1, precision="bf16")
@pytest.mark.slow_unless(run_file="convvitb", contrast="infonce", crop="shift", accumulation=2)
@pytest.mark.parametrize(("run_file", "contrast", "crop", "accumulation", "precision"), GRID)
def test_a_step_stays_on_the_gpu_and_the_host_never_waits(
    gpu: FakeGpu,
    tmp_path: Path,
    run_file: str,
    contrast: str,
    crop: str,
    accumulation: int,
    precision: str,
) -> None:
    run = read(run_file, CONTRASTS[contrast] + CROPS[crop], accumulation, tmp_path)
    one = Pass(run, PRECISIONS[precision])
    gpu.waits.clear()
    losses = one.take()
    assert gpu.waits == []
    assert losses.device == CUDA
    assert losses.shape == (3,)
    for name, parameter in one.model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.device == CUDA, name


@pytest.mark.parametrize("run_file", ["vits", "convvitb"])
def test_what_is_read_at_a_log_line_and_exported_comes_to_the_cpu(
    gpu: FakeGpu, tmp_path: Path, run_file: str
) -> None:
    one = Pass(read(run_file, (), 1, tmp_path), torch.bfloat16)
    one.take()
    figures = one.health.read(contrast=1.0)
    assert {"grad_norm_encoder", "target_distance", "query_spread", "key_spread"} <= figures.keys()
    assert gpu.waits
    assert all(value.device.type == "cpu" for value in gather_weights(one.model.online_encoder).values())


@pytest.mark.parametrize("crop", CROPS)
def test_pictures_are_made_on_the_gpu(gpu: FakeGpu, tmp_path: Path, crop: str) -> None:
    run = read("vits", CROPS[crop], 1, tmp_path)
    one = Pass(run, torch.bfloat16)
    side = run.cmae.views.master_px
    masters = torch.zeros(2, 3, side, side, dtype=torch.uint8).to(CUDA)
    gpu.waits.clear()
    pictures = preview(one.engine, masters, cfg=run.cmae)
    assert pictures.images.device.type == "cpu"
    assert {wait.what for wait in gpu.waits} == {"copy to the CPU"}


def test_a_view_that_asks_the_gpu_is_found(gpu: FakeGpu, tmp_path: Path) -> None:
    """Tests of the fake itself: a blocking copy, a value, a shape, a tensor left on the CPU."""
    views = read("vits", (), 1, tmp_path).cmae.views
    images = torch.zeros(2, 3, 8, 8).to(CUDA, non_blocking=True)
    assert gpu.waits == []
    denormalise(images, views=views)
    assert gpu.waits == []

    def found(work: Callable[[], object]) -> list[str]:
        gpu.waits.clear()
        work()
        return [wait.what for wait in gpu.waits]

    assert found(lambda: images.to("cpu")) == ["copy to the CPU"]
    assert found(lambda: torch.zeros(3).to(CUDA)) == ["blocking copy to the GPU"]
    assert found(lambda: torch.tensor([1.0, 2.0], device=CUDA)) == ["blocking copy to the GPU"]
    assert found(lambda: images.sum().item()) == ["_local_scalar_dense"]
    assert found(lambda: bool(images.isfinite().all())) == ["_local_scalar_dense"]
    assert found(lambda: images[0, 0, 0].tolist()) == ["_local_scalar_dense"] * 8
    assert found(lambda: images.nonzero()) == ["nonzero"]
    assert found(lambda: images[images > 0]) == ["boolean index"]
    assert found(lambda: images.masked_select(images > 0)) == ["masked_select"]
    assert found(lambda: images.unique()) == ["_unique2"]
    assert found(lambda: torch.equal(images, images + 1)) == ["equal"]
    assert found(lambda: images[torch.tensor([0, 1])]) == ["index from the CPU"]
    assert found(lambda: torch.cuda.synchronize()) == ["synchronize"]
    assert found(lambda: torch.cuda.Event().synchronize()) == ["event"]
    assert found(lambda: images.add_(1.0).mul(torch.tensor(2.0)).clamp(0, 1)[:, None, ::2]) == []
    with pytest.raises(RuntimeError, match="device"):
        images + torch.zeros(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="device"):
        images.index_select(0, torch.tensor([0]))
