"""What ranks tell each other lies where their backend takes it: on the GPU for NCCL, on the CPU for gloo."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmae_scale.config.transfer import KnnConfig
from cmae_scale.core import collectives
from cmae_scale.engine.metrics.health import Health
from cmae_scale.engine.metrics.logger import MetricAverage
from cmae_scale.engine.metrics.step_timer import StepTimer
from cmae_scale.engine.process.agreement import RankAgreement
from cmae_scale.engine.process.signals import StopRequest
from cmae_scale.engine.step_guard import NonFiniteGuard
from cmae_scale.engine.zero.partitions import measure_gradients
from cmae_scale.models.heads import SyncBatchNorm
from cmae_scale.tasks.evaluator import build_bank, score, vote
from cmae_scale.tasks.features import Features, gather_features
from tests.fakes.gpu import CUDA, FakeGpu, fake_gpu
from tests.fakes.ranks import FakeRanks, WrongDeviceError, fake_ranks


class Place(NamedTuple):
    gpu: FakeGpu
    ranks: FakeRanks


@pytest.fixture
def place() -> Iterator[Place]:
    with fake_gpu() as gpu, fake_ranks(gpu) as ranks:
        yield Place(gpu, ranks)


def rows(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, device=CUDA, **kwargs)


def average_metrics() -> Tensor:
    average = MetricAverage(("loss",))
    average.add(rows(1))
    assert average.read().keys() == {"loss"}
    return rows(1)


def normalise() -> Tensor:
    norm = SyncBatchNorm(4).to(CUDA)
    output: Tensor = norm(rows(3, 4, requires_grad=True))
    torch.autograd.backward(output.sum())
    return output


def look_at_health() -> Tensor:
    health = Health({"all": [nn.Parameter(rows(3))]}, distance=None, chance=None)
    health.is_due = True
    health.look_at_features(rows(2, 4), rows(4, 4))
    return next(iter(health._spreads.values()))


def measure_norms() -> Tensor:
    parameter = nn.Parameter(rows(3))
    parameter.grad = rows(3)
    return measure_gradients(type("Engine", (), {"optimizer": None}), {"all": [parameter]})


def time_steps() -> Tensor:
    timer = StepTimer(CUDA, is_on=True)
    with timer.span("forward"):
        rows(3).add_(1.0)
    assert timer.read(1)
    return rows(1)


def find_neighbours() -> Tensor:
    features = Features(rows(5, 4), rows(5, dtype=torch.int64), ("key",) * 5)
    return vote(features, build_bank(features), cfg=KnnConfig(k=2), classes=3)


@pytest.mark.parametrize(
    ("talk", "calls"),
    [
        (lambda: collectives.gather_rows(rows(2, 3)), 1),
        (lambda: collectives.stack_ranks(rows(3)), 1),
        (lambda: collectives.mean_of_ranks(rows(3)), 1),
        (lambda: collectives.sum_of_ranks(rows(3)), 1),
        (average_metrics, 1),
        (normalise, 2),
        (look_at_health, 1),
        (measure_norms, 1),
        (time_steps, 1),
        (find_neighbours, 3),
        (lambda: gather_features(Features(rows(5, 4), rows(5, dtype=torch.int64), ("key",) * 5)).values, 2),
    ],
)
def test_what_is_sent_lies_on_the_gpu(place: Place, talk: Callable[[], Tensor], calls: int) -> None:
    assert talk().device == CUDA
    assert len(place.ranks.calls) == calls


def test_scores_are_counted_on_the_gpu_and_told_on_the_cpu(place: Place) -> None:
    assert score(rows(4, 3), rows(4, dtype=torch.int64)).confusion.device.type == "cpu"
    assert place.ranks.calls == ["allreduce"]


def test_ranks_agree_on_the_cpu_and_the_gpu_goes_on(place: Place) -> None:
    assert RankAgreement(StopRequest()).answer(lambda: 1).result == 1
    assert place.ranks.calls == ["allreduce"]
    assert place.gpu.waits == []


@pytest.mark.parametrize(("size", "rounds"), [(65, 7), (128, 7), (129, 8), (1024, 10)])
def test_many_ranks_agree_in_rounds_that_grow_with_the_logarithm_of_their_number(
    size: int, rounds: int
) -> None:
    with fake_gpu() as gpu, fake_ranks(gpu, size=size) as ranks:
        group = ranks.make_group(backend="gloo")
        assert collectives.highest_of_ranks(torch.zeros(2), group=group).shape == (2,)
        assert ranks.calls == ["recv", "send"] * rounds
        assert gpu.waits == []


@pytest.mark.parametrize("spike", [None, 6.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_guard_computes_on_the_gpu_and_asks_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, spike: float | None, accumulation: int
) -> None:
    """Whether a loss is finite, or jumps; what follows an applied step."""
    engine = Engine(accumulation)
    guard = NonFiniteGuard(engine, metric_names=("loss",), device=CUDA, spike=spike)
    monkeypatch.setattr(guard._update, "step", lambda: True)
    place.gpu.waits.clear()
    for step in range(3):
        guard.open(step, keys=("key",))
        for engine.micro in range(accumulation):
            engine.backward(engine.module(rows(3, 4)).square().mean())
        assert guard.apply(rows(1))
    guard._undo()
    assert place.gpu.waits == []
    assert len(place.ranks.calls) == (3 if spike else 0)


class Engine:
    """As much of DeepSpeed's as the guard asks of one."""

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    torch_autocast_z0_gradscaler = None
    global_rank = 0

    def __init__(self, accumulation: int) -> None:
        self.accumulation, self.micro = accumulation, 0
        self.module = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).to(CUDA)

    def fp16_enabled(self) -> bool:
        return False

    bfloat16_enabled = fp16_enabled

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.micro == self.accumulation - 1

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        torch.autograd.backward(loss)


def test_planted_faults_are_found(place: Place) -> None:
    group = dist.new_group(backend="gloo")
    for talk in (collectives.gather_rows, collectives.mean_of_ranks, collectives.sum_of_ranks):
        with pytest.raises(WrongDeviceError, match="NCCL got a tensor on the cpu"):
            talk(torch.zeros(2, 3))
    with pytest.raises(WrongDeviceError, match="gloo got a tensor on the GPU"):
        dist.all_reduce(rows(3), group=group)
    with pytest.raises(WrongDeviceError, match="NCCL got a tensor on the cpu"):
        dist.all_gather_into_tensor(rows(4), torch.zeros(2))
    dist.all_reduce(torch.zeros(3), group=group)
    dist.barrier()
    assert place.gpu.waits == []
    assert collectives.gather_objects("it") == ["it", "it"]
    assert [wait.what for wait in place.gpu.waits] == ["all_gather_object"]
