from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cmae_scale.engine.ema as ema_module
from cmae_scale.engine.ema import TargetEma
from cmae_scale.engine.zero.partitions import Master, master_of
from tests.fakes.gpu import CUDA, fake_gpu

CPU = torch.device("cpu")


def layers(count: int, rng: torch.Generator) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3, number + 1, generator=rng)) for number in range(count)]


def test_the_average_equals_its_definition(rng: torch.Generator) -> None:
    online, target = layers(4, rng), layers(4, rng)
    expected = [parameter.detach().double() for parameter in target]
    ema = TargetEma(
        [(str(i), o, t) for i, (o, t) in enumerate(zip(online, target, strict=True))],
        keep_master=False,
        device=CPU,
    )
    for momentum in (0.9, 0.996, 1.0, 0.5):
        ema.update_(momentum)
        expected = [
            momentum * old + (1 - momentum) * new.detach().double()
            for old, new in zip(expected, online, strict=True)
        ]
    for got, want in zip(target, expected, strict=True):
        torch.testing.assert_close(got.detach(), want.float(), rtol=1e-6, atol=1e-6)


def test_it_equals_timms_average(rng: torch.Generator) -> None:
    from timm.utils import ModelEmaV3

    model = nn.Linear(4, 4)
    reference = ModelEmaV3(model, decay=0.99)
    followed = nn.Linear(4, 4)
    followed.load_state_dict(model.state_dict())
    ema = TargetEma(
        [(n, o, t) for (n, o), t in zip(model.named_parameters(), followed.parameters(), strict=True)],
        keep_master=False,
        device=CPU,
    )
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=rng)
        reference.update(model)
        ema.update_(0.99)
    for got, want in zip(followed.parameters(), reference.module.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep_master", [False, True])
def test_a_bf16_target_moves_only_with_a_master(keep_master: bool) -> None:
    """At momentum 0.996 a bf16 average from 1.0 towards 1.2 stays at 1.0 for ever."""
    online = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    target = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    ema = TargetEma([("weight", online, target)], keep_master=keep_master, device=CPU)
    online.data.fill_(1.2)
    for _ in range(1000):
        ema.update_(0.996)
    assert target.detach().float().max() == pytest.approx(1.2 if keep_master else 1.0, abs=0.01)


@pytest.mark.parametrize("offloaded", ["master_of", "partition_of"])
def test_what_is_offloaded_is_averaged_where_it_lies_and_compared_on_the_device(
    monkeypatch: pytest.MonkeyPatch, offloaded: str
) -> None:
    """Weights on a GPU that is not there; every second one has its master, or its shard, on the CPU."""
    keep_master = offloaded == "master_of"
    with fake_gpu():
        pairs = [
            (str(number), *(nn.Parameter(torch.ones(number + 1, device="cuda").half()) for _ in "ot"))
            for number in range(4)
        ]
        lying = {id(one): CPU if int(name) % 2 else one.device for name, *both in pairs for one in both}

        def find(one: nn.Parameter) -> Any:
            values = one.data.to(lying[id(one)]).float()
            return Master(values) if keep_master else values

        monkeypatch.setattr(ema_module, offloaded, find)
        ema = TargetEma(pairs, keep_master=keep_master, device=CUDA)
        ema.update_(0.9)
        assert ema.measure_distance().device.type == "cuda"
        for (name, *_), master in zip(pairs, ema.masters or [], strict=keep_master):
            assert master.values.device.type == ("cpu" if int(name) % 2 else "cuda")


def test_a_plain_mae_has_nothing_to_average() -> None:
    TargetEma([], keep_master=False, device=CPU).update_(0.9)


@pytest.mark.slow_unless(stage=2, threshold=0)
@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0, 10**6], ids=["all split", "small ones whole"])
def test_the_average_is_bit_equal_under_every_zero_stage(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
    threshold: int,
) -> None:
    """Without learning the target must approach the online weights by the same bits on two ranks."""

    def follow(stage: int) -> Callable[[], Any]:
        def inside() -> Any:
            from cmae_scale.engine.process.group import start_processes
            from cmae_scale.engine.setup import start_pretraining
            from cmae_scale.engine.zero.partitions import gather_weights

            zero = {
                "stage": stage,
                **({"stage3_param_persistence_threshold": threshold} if stage == 3 else {}),
            }
            run = tiny_run(ranks=2, zero_optimization=zero)
            state = start_pretraining(run, context=start_processes(), data_order="none")
            with torch.no_grad():
                for parameter in state.ema.online:  # as an optimizer step would
                    shard = getattr(parameter, "ds_tensor", parameter.data)
                    shard.mul_(1.5)
                    if parameter.data.numel() and parameter.data_ptr() != shard.data_ptr():
                        parameter.data.mul_(1.5)
            for _ in range(3):
                state.ema.update_(0.9)
            module = state.engine.module
            return gather_weights(module.target_encoder) | gather_weights(module.target_projector)

        return inside

    plain = on_ranks(follow(0), ranks=2)[0]
    for answer in on_ranks(follow(stage), ranks=2):
        for name, value in plain.items():
            assert torch.equal(answer[name], value), name


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bucket", [1 << 26, 1000], ids=["one bucket", "many"])
@pytest.mark.parametrize(("engine", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_ranks_with_parts_of_the_masters_average_without_asking_for_each_parameter(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    stage: int,
    bucket: int,
    engine: str,
    dtype: torch.dtype,
) -> None:
    """Where weights are rounded, beside an average of gathered fp32 ones: the same bits on every rank."""

    def follow() -> Any:
        import torch.distributed as dist
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import safe_get_full_fp32_param

        from cmae_scale.engine.process.group import start_processes
        from cmae_scale.engine.setup import start_pretraining

        type(get_accelerator()).is_fp16_supported = lambda self: True  # torch computes without
        ema_module.BUCKET_ELEMENTS = bucket
        run = tiny_run(ranks=2, stage=stage, **{engine: {"enabled": True}})
        state = start_pretraining(run, context=start_processes(), data_order="none")
        ema, calls = state.ema, []
        wholes = [safe_get_full_fp32_param(p).clone().view(p.shape) for p in ema.online]
        expected = [whole.clone() for whole in wholes]
        with torch.no_grad():  # as an optimizer step does: every rank moves its own part
            for parameter in ema.online:
                master_of(parameter).values.mul_(1.25).add_(0.01)
        reduce = dist.all_reduce
        dist.all_reduce = lambda *args, **kwargs: calls.append(args[0].numel()) or reduce(*args, **kwargs)
        for _ in range(3):
            ema.update_(0.9)
        dist.all_reduce = reduce
        for whole, average in zip(wholes, expected, strict=True):
            for _ in range(3):
                average.lerp_(whole * 1.25 + 0.01, 1 - 0.9)
        targets = [target.detach().clone() for target in ema.target]
        held = sum(master.values.numel() for master in ema.masters)
        return targets, expected, len(calls), held, float(ema.measure_distance())

    answers = on_ranks(follow, ranks=2)
    total = sum(target.numel() for target in answers[0][0])
    assert answers[0][3] + answers[1][3] == total
    assert answers[0][4] == answers[1][4] > 0
    for targets, expected, calls, held, _ in answers:
        assert held < total
        assert calls == 3 if bucket > total else 3 < calls < 3 * len(targets)
        for target, average in zip(targets, expected, strict=True):
            assert torch.equal(target, average.to(dtype))
