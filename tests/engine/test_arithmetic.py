"""Number format and attention kernels: who decides, what is kept, what is told."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.checkpoints import commit
from cmae_scale.config.precision import leave_to_machine_, read_formats
from cmae_scale.config.run_file import Run, dump_run, read_run
from cmae_scale.core.errors import ConfigError
from cmae_scale.engine import precision
from cmae_scale.engine.checkpoint.metadata import build_metadata
from cmae_scale.engine.precision import Product, name_half, settle_arithmetic, settle_precision
from cmae_scale.engine.setup import find_product, list_attention
from cmae_scale.layers.attention import Arithmetic, AttentionChoice, AttentionShape

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PRODUCT = Product(512, 192, 768)
NAMED = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
IMITATED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture
def half_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`half_is(3.0)`: a machine on which products of two bytes are 3 times as fast as those of fp32."""

    def pretend(times: float) -> None:
        monkeypatch.setattr(precision, "time_in_turns", lambda ways: [1.0, 1.0 / times])

    return pretend


@pytest.fixture
def gpu_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], None]:
    """`gpu_is("Tesla T4", 7, 5)`: a GPU of that compute capability."""

    def pretend(name: str, major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    return pretend


@pytest.fixture
def open_run(tiny_run: Callable[..., Run]) -> Callable[..., Run]:
    """`open_run(**deepspeed)`: as `read_run` reads such a file, and resolved."""

    def build(**more: Any) -> Run:
        run = tiny_run(**more)
        leave_to_machine_(run.deepspeed)
        return run

    return build


def write_state(run: Run, attention: dict[str, str]) -> None:
    """A state of `run`, as far as the start of the next one looks at it."""
    metadata = build_metadata(run, kind={}, ranks=1, precision="", attention=attention)
    part = commit.name_part(run.out / "checkpoints", step=5)
    part.mkdir(parents=True)
    counters = dict.fromkeys(["global_steps", "global_samples", "skipped_steps"], 5)
    others = {"lr": [], "scheduler": None, "scaler": {}, "grad_scaler": None}
    file = {"rank_00000.safetensors": {"bytes": 0, "sha256": ""}}
    about = {"step": 5, "counters": {**counters, **others}, "extra": {}, "files": file}
    commit.write_description(part, {**about, "stamp": vars(metadata)})
    commit.commit(part)


@pytest.mark.parametrize(
    ("times", "compute"), [(8.0, "bfloat16"), (1.3, "bfloat16"), (1.1, "float32"), (0.1, "float32")]
)
def test_a_cpu_takes_bf16_where_that_is_clearly_faster(
    open_run: Callable[..., Run], half_is: Callable[[float], None], times: float, compute: str
) -> None:
    half_is(times)
    run, [told] = settle_precision(open_run(), device=CPU, product=PRODUCT)
    assert read_formats(run.deepspeed) == (compute, "float32")
    assert told.startswith(f"precision: {compute} products, float32 weights: bfloat16 ")
    ratio = f"is {times:.2g} times as fast" if times > 1 else f"takes {1 / times:.2g} times as long"
    assert f"{ratio} as float32 on this CPU (128 x 192 @ 192 x 768, forwards and backwards)" in told


@pytest.mark.parametrize(
    ("name", "major", "minor", "half"),
    [
        ("Tesla V100-SXM2-16GB", 7, 0, "float16"),
        ("Tesla T4", 7, 5, "float16"),
        ("NVIDIA A100-SXM4-80GB", 8, 0, "bfloat16"),
        ("NVIDIA L4", 8, 9, "bfloat16"),
        ("NVIDIA B200", 10, 0, "bfloat16"),
    ],
)
def test_a_gpu_takes_what_it_has_in_hardware(
    open_run: Callable[..., Run],
    gpu_is: Callable[[str, int, int], None],
    name: str,
    major: int,
    minor: int,
    half: str,
) -> None:
    gpu_is(name, major, minor)
    run, [told] = settle_precision(open_run(), device=GPU, product=PRODUCT)
    assert read_formats(run.deepspeed) == (half, "float32")
    assert told == f"precision: {half} products, float32 weights: the {name} has {half} in hardware"
    named, told_of_named = settle_precision(open_run(**NAMED), device=GPU, product=PRODUCT)
    assert named.deepspeed["torch_autocast"] == NAMED["torch_autocast"]
    assert len(told_of_named) == (half == "float16")


def test_a_gpu_of_amd_has_bf16(
    monkeypatch: pytest.MonkeyPatch, gpu_is: Callable[[str, int, int], None]
) -> None:
    gpu_is("AMD Instinct MI250X", 7, 0)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert name_half(GPU) == "bfloat16"


@pytest.mark.parametrize(
    ("sections", "remedy"),
    [
        (NAMED, "torch_autocast.enabled=auto torch_autocast.dtype=auto"),
        ({"bf16": {"enabled": True}}, "torch_autocast.enabled=auto bf16.enabled=false"),
    ],
    ids=["autocast", "bf16 engine"],
)
def test_a_slow_precision_that_is_named_is_obeyed_with_a_warning(
    open_run: Callable[..., Run], half_is: Callable[[float], None], sections: dict[str, Any], remedy: str
) -> None:
    half_is(0.25)
    before = open_run(**sections)
    run, [told] = settle_precision(before, device=CPU, product=PRODUCT)
    assert run == before
    assert told.startswith("warning: a slow precision is named (bfloat16 takes 4 times as long as float32")
    assert told.endswith(f": write {remedy}")
    half_is(4.0)
    assert settle_precision(before, device=CPU, product=PRODUCT) == (before, [])


def test_full_precision_that_is_named_is_no_matter(
    open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "time_in_turns", None)  # nothing is tried
    run = open_run(torch_autocast={"enabled": False})
    assert settle_precision(run, device=CPU, product=PRODUCT) == (run, [])


@pytest.mark.parametrize(("at_first", "later"), [(4.0, 0.25), (0.25, 4.0)])
def test_the_run_folders_file_holds_the_choice(
    open_run: Callable[..., Run],
    half_is: Callable[[float], None],
    tmp_path: Path,
    at_first: float,
    later: float,
) -> None:
    half_is(at_first)
    run, _ = settle_precision(open_run(), device=CPU, product=PRODUCT)
    (tmp_path / "config.json").write_text(dump_run(run))
    half_is(later)
    again, _ = settle_precision(read_run(tmp_path / "config.json"), device=CPU, product=PRODUCT)
    assert again.deepspeed == run.deepspeed


@pytest.mark.parametrize(("at_first", "later"), [(4.0, 0.25), (0.25, 4.0)])
def test_a_run_goes_on_in_the_precision_of_its_state_and_says_what_the_machine_would_take(
    open_run: Callable[..., Run], half_is: Callable[[float], None], at_first: float, later: float
) -> None:
    half_is(at_first)
    begun, _ = settle_precision(open_run(), device=CPU, product=PRODUCT)
    write_state(begun, {})
    compute = read_formats(begun.deepspeed).compute
    run, [told] = settle_precision(open_run(), device=CPU, product=PRODUCT)
    assert (run.deepspeed, told) == (
        begun.deepspeed,
        f"precision: {compute} products, as in the state from which the run goes on",
    )
    half_is(later)
    run, [told] = settle_precision(open_run(), device=CPU, product=PRODUCT)
    assert run.deepspeed == begun.deepspeed
    other = "float32" if compute == "bfloat16" else "bfloat16"
    assert f"; a new run would have {other} here: bfloat16 " in told
    run, _ = settle_precision(open_run(cmae={"checkpoint": {"resume": "never"}}), device=CPU, product=PRODUCT)
    assert read_formats(run.deepspeed).compute == other


@pytest.mark.dist
def test_the_first_rank_decides_for_all(
    on_ranks: Callable[..., list[Any]], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(ways: Any) -> list[float]:
        return [1.0, 0.1] if os.environ["RANK"] == "0" else [1.0, 10.0]

    monkeypatch.setattr(precision, "time_in_turns", times)
    monkeypatch.setattr("cmae_scale.layers.attention.time_in_turns", times)
    run = open_run(ranks=2)

    def on_init() -> Any:
        from cmae_scale.engine.process.group import start_processes

        context = start_processes()
        shapes = list_attention(run)
        settled = settle_arithmetic(
            run, device=context.device, product=find_product(run), attention="auto", shapes=shapes
        )
        return settled.run.deepspeed["torch_autocast"], settled.attention, settled.notices

    first, second = on_ranks(on_init, ranks=2)
    assert first == second
    assert first[0] == {"enabled": True, "dtype": "bfloat16"}
    assert {choice.name for choice in first[1].values()} == {"explicit"}


def test_every_part_has_the_shape_that_the_run_gives_it(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run(cmae={"target": {"mask_ratio": 0.25}, "model": {"pixel_decoder": {"num_heads": 4}}})
    assert list_attention(run) == {
        "online_encoder": AttentionShape(2, 16, 8 + 1, images=8),
        "target_encoder": AttentionShape(2, 16, 12 + 1, images=8, is_trained=False),
        "pixel_decoder": AttentionShape(4, 4, 16 + 1, images=8),
        "feature_decoder": AttentionShape(2, 8, 16 + 1, images=8),
    }
    assert find_product(run) == Product(8 * 9, 32, 128)
    assert list(list_attention(tiny_run(cmae={"loss": {"weight": 0.0}}))) == [
        "online_encoder",
        "pixel_decoder",
    ]


@pytest.fixture
def kernels_are(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`kernels_are(encoder="explicit")`: what a trial of each part would say."""

    def pretend(**names: str) -> None:
        def choose(setting: str, shape: AttentionShape, where: Arithmetic, **_: Any) -> AttentionChoice:
            return AttentionChoice(names["encoder" if shape.tokens == 5 else "decoder"], is_forced=False)

        monkeypatch.setattr(precision, "choose_attention", choose)

    return pretend


SHAPES = {"encoder": AttentionShape(2, 16, 5), "decoder": AttentionShape(2, 16, 17)}


def test_a_run_goes_on_with_the_kernels_of_its_state(
    open_run: Callable[..., Run], kernels_are: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(torch_autocast={"enabled": False})

    def on_init(**more: Any) -> precision.Settled:
        return settle_arithmetic(
            run, **{"device": CPU, "product": PRODUCT, "attention": "auto", "shapes": SHAPES, **more}
        )

    kernels_are(encoder="flash", decoder="explicit")
    first = on_init()
    write_state(run, first.record)
    kernels_are(encoder="explicit", decoder="explicit")
    assert on_init() == first
    monkeypatch.setattr(precision, "name_device", lambda device: "NVIDIA L4")
    elsewhere = on_init()
    assert {choice.name for choice in elsewhere.attention.values()} == {"explicit"}
    [told] = elsewhere.notices
    assert "attention is explicit from here on, which rounds otherwise" in told
    assert "written on a CPU with" in told


@pytest.mark.dist
def test_a_trial_that_comes_out_otherwise_changes_no_bit_of_a_run_that_goes_on(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Run],
    train_tiny: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def run(folder: str) -> Run:
        return tiny_run(cmae={"out": str(tmp_path / folder), "model": {"attention": "auto"}})

    def prefer(fused_s: float) -> None:
        monkeypatch.setattr("cmae_scale.layers.attention.time_in_turns", lambda ways: [fused_s, 1.0])

    def begin() -> Any:
        straight = train_tiny(run("straight"), steps=4)
        train_tiny(run("stopped"), steps=2, save_at=2)
        return straight

    prefer(3.0)
    straight = on_ranks(begin, ranks=1)[0]
    prefer(0.3)
    resumed = on_ranks(lambda: train_tiny(run("stopped"), steps=4), ranks=1)[0]
    other = on_ranks(lambda: train_tiny(run("other"), steps=4), ranks=1)[0]
    assert resumed["first_step"] == 2
    assert torch.equal(resumed["losses"][3], straight["losses"][3])
    name = "online_encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(resumed["weights"][name], straight["weights"][name])
    assert not torch.equal(other["weights"][name], straight["weights"][name])  # kernels do round otherwise


@pytest.mark.dist
def test_each_part_of_the_model_runs_its_own_kernel(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(setting: str, shape: AttentionShape, where: Arithmetic, **_: Any) -> AttentionChoice:
        return AttentionChoice("explicit" if shape.is_trained else "flash", is_forced=False)

    monkeypatch.setattr(precision, "choose_attention", choose)
    run = tiny_run(cmae={"model": {"attention": "auto"}})

    def look() -> Any:
        from cmae_scale.engine.process.group import start_processes
        from cmae_scale.engine.setup import start_pretraining

        state = start_pretraining(run, context=start_processes(), data_order={})
        fused = {
            name.partition(".")[0]: module.fused_attn
            for name, module in state.engine.module.named_modules()
            if hasattr(module, "fused_attn")
        }
        return fused, state.metadata.attention

    fused, record = on_ranks(look, ranks=1)[0]
    parts = ["online_encoder", "pixel_decoder", "feature_decoder", "target_encoder"]
    assert fused == {part: part == "target_encoder" for part in parts}
    assert {part: record[part] == "flash" for part in parts} == fused


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_named_kernel_is_tried_on_every_part(open_run: Callable[..., Run], kernel: Any) -> None:
    run = open_run(torch_autocast={"enabled": False})
    with pytest.raises(ConfigError) as error:
        settle_arithmetic(run, device=CPU, product=PRODUCT, attention=kernel, shapes=SHAPES)
    assert f'cmae.model.attention "{kernel}" cannot run 5 tokens in heads of 16 in float32' in str(
        error.value
    )
    settled = settle_arithmetic(run, device=CPU, product=PRODUCT, attention="math", shapes=SHAPES)
    assert settled.attention == dict.fromkeys(SHAPES, AttentionChoice("math", is_forced=True))


def settle_quickstart(repository: Path, **environment: str) -> str:
    """Which format the quickstart's products have on this machine, in a fresh process."""
    code = (
        "import sys, torch\n"
        "from cmae_scale.config.run_file import read_run\n"
        "from cmae_scale.config.precision import read_formats\n"
        "from cmae_scale.engine.precision import Product, settle_precision\n"
        "run = read_run('ds_configs/quickstart.json', ['cmae.checkpoint.resume=never'])\n"
        "product = Product(64 * 23, 192, 768)\n"
        "run, told = settle_precision(run, device=torch.device('cpu'), product=product)\n"
        "print(*told, read_formats(run.deepspeed).compute, sep='\\n')"
    )
    kept = {name: value for name, value in os.environ.items() if name not in IMITATED}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env={**kept, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_quickstarts_precision_follows_the_machine(repository: Path) -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "avx2" not in flags:
        pytest.skip("an x86 with AVX2 is needed, which can be told to do without what came later")
    assert settle_quickstart(repository, **IMITATED) == "float32"
    if {"avx512_bf16", "amx_bf16"} & set(flags):
        assert settle_quickstart(repository) == "bfloat16"
