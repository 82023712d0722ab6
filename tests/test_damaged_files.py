"""Whatever became of a file of a run folder or a shard folder: its readers read it, or say one sentence."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmae_scale.config.cmae import DataConfig, FaultsConfig
from cmae_scale.config.run_file import read_run
from cmae_scale.core.errors import UserError

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Mutation = Callable[[Path], None]

ODD_CONTENTS = [
    b"",
    b"\n",
    b"null",
    b"17",
    b"[]",
    b"{}",
    b'"text"',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"1" * 5000,
    b'{"step": ' + b"1" * 5000 + b"}",
    b"\xff\xfe{\x00}\x00",
    b"\0" * 600,
    b"{}\n\xff\n{}\n",
]
ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        2**63,
        2**64 - 1,
        0.5,
        1e308,
        "",
        "a",
        "9" * 30,
        "x" * 5000,
        "\x1b[2J\r",
        "../../x",
        "a/b",
    ),
    *([], [[]], {}, {"": {}}, [None], ["a", 1]),
]


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def change_bytes(at: float, cut: int, inserted: bytes) -> Mutation:
    def mutate(path: Path) -> None:
        content = path.read_bytes()
        place = int(at * len(content))
        path.write_bytes(content[:place] + inserted + content[place + cut :])

    return mutate


def change_json(choice: int, value: Any, act: str) -> Mutation:
    """A value somewhere in the file's JSON, or its lines', becomes another, goes, or is renamed."""

    def mutate(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        is_lines = path.suffix == ".jsonl"
        trees = [json.loads(line) for line in (text.splitlines() if is_lines else [text])]
        places = [place for tree in trees for place in list_places(tree)]
        if not places:
            return
        node, name = places[choice % len(places)]
        if act == "delete":
            del node[name]
        elif act == "rename" and isinstance(node, dict):
            node[str(value)[:50]] = node.pop(name)
        else:
            node[name] = value
        path.write_text("\n".join(map(json.dumps, trees)))

    return mutate


def list_places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for name, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, name
            yield from list_places(value)


def overwrite(content: bytes) -> Mutation:
    def mutate(path: Path) -> None:
        path.write_bytes(content)

    return mutate


BYTES = st.builds(
    change_bytes,
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([0, 1, 1, 7, 512, 10**6]),
    st.binary(max_size=9) | st.sampled_from([b"\xff", b"-", b"_", b"9" * 12, b"\x80\0\0\0"]),
)
ANY = BYTES | st.sampled_from(
    [
        Path.unlink,
        replace_by_folder,
        replace_by_broken_link,
        *(overwrite(content) for content in ODD_CONTENTS),
    ]
)
IN_JSON = st.builds(
    change_json,
    st.integers(0, 10**6),
    st.sampled_from(ODD_VALUES),
    st.sampled_from(["replace", "replace", "delete", "rename"]),
)


def copy_fresh(source: Path, target: Path) -> None:
    """Make `target` what `source` is, with links instead of copies: see `unshare`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)


def unshare(path: Path) -> None:
    """Have a file of its own, whose changes reach no other link."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.fixture(autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Without the checks of types, which would find what a reader should have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


WRITTEN: list[dict[str, Any]] = []  # the lines of metrics as the run wrote them


def read_all(*readers: Callable[[], Any]) -> None:
    """Nothing but the user's errors may come out of any of them, each a sentence."""
    for read in readers:
        try:
            read()
        except UserError as error:
            if "\n" in (told := str(error)):
                raise AssertionError(f"more than a sentence: {told!r}") from error


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_prep.make_shards import main

    folder = tmp_path_factory.mktemp("damaged") / "digits"
    main(["--source", "digits", "--limit", "60", "--samples_per_shard", "30", "--out", str(folder)])
    train = folder / "train"
    skipped = {"shard": "shard-00000.tar", "position": 3, "name": "a.png", "kind": "bad", "reason": "torn"}
    (train / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    return train


def read_shards(folder: Path) -> None:
    from cmae_scale.data.decode import decode_image
    from cmae_scale.data.shard_set import open_shards
    from data_prep.check_shards import main as check
    from data_prep.manifest import read_skipped

    def read() -> None:
        for shard in open_shards(str(folder), data=DataConfig(shards=str(folder))).shards:
            for sample in (*shard.read(0, shard.info.samples), *shard.read(5, 3)):
                with suppress(UserError):
                    decode_image(sample.image, max_mpx=1)

    read_all(read, lambda: check([str(folder)]), lambda: read_skipped(folder))


def pick(folder: Path) -> st.SearchStrategy[tuple[str, Mutation]]:
    """A file of the folder and what becomes of it."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names
    return st.sampled_from(names).flatmap(
        lambda name: st.tuples(
            st.just(name), ANY | IN_JSON if name.endswith((".json", ".jsonl", ".offsets")) else ANY
        )
    )


@FUZZ
@given(data=st.data())
def test_a_shard_folder_with_one_file_changed(shards: Path, tmp_path: Path, data: st.DataObject) -> None:
    name, mutate = data.draw(pick(shards))
    copy_fresh(shards, tmp_path / "shards")
    unshare(tmp_path / "shards" / name)
    mutate(tmp_path / "shards" / name)
    read_shards(tmp_path / "shards")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    repository = Path(__file__).resolve().parent.parent
    out = tmp_path_factory.mktemp("finished") / "run"
    model = ("cmae.model.embed_dim=24", "cmae.model.depth=2", "cmae.model.num_heads=2")
    decoders = [f"cmae.model.{part}_decoder.embed_dim=24" for part in ("pixel", "feature")]
    length = ("cmae.schedule.duration=4st", "cmae.checkpoint.every=2st", "cmae.monitor.log_every=1")
    more = (
        f"cmae.data.shards={shards}",
        "cmae.data.val_shards=null",
        "cmae.faults.spike=9",
        "train_batch_size=8",
    )
    command = [
        sys.executable,
        "-m",
        "cmae_scale.pretrain",
        "--deepspeed_config",
        "ds_configs/quickstart.json",
    ]
    line = [*command, "--out", str(out), "--set", *model, *decoders, *length, *more]
    done = subprocess.run(line, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bad = {"key": "shard-00000.tar/00000003", "reason": "torn"}
    (out / "bad_samples.jsonl").write_text(json.dumps(bad) + "\n")
    left_out = {"step": 3, "cause": "loss is not finite", "ranks": [0], "losses": {}, "samples": []}
    (out / "skipped_steps.jsonl").write_text(json.dumps({**left_out, "rewound_to": None}) + "\n")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    scores = {"step": 2, "epoch": 0.5, "val_top1": 0.5, "val_per_class": {"a": 0.5}}
    (out / "metrics.jsonl").write_text("\n".join([*lines[:2], json.dumps(scores), *lines[2:]]) + "\n")
    from cmae_scale.report import read_metrics

    WRITTEN[:] = read_metrics(out / "metrics.jsonl")
    return out


def read_finished(run: Path) -> None:
    from cmae_scale.core.world import World
    from cmae_scale.engine.metrics.files import BadList, drop_later_lines
    from cmae_scale.engine.process.lifecycle import open_folder
    from cmae_scale.engine.skipped_steps import SkippedSteps
    from cmae_scale.models.pretrained import open_encoder
    from cmae_scale.tasks.study import read_curve

    read_all(
        lambda: read_run(run / "config.json"),
        lambda: read_state(run / "checkpoints"),
        lambda: read_logs(run),
        lambda: read_encoder_folder(run / "encoder"),
        lambda: open_encoder(str(run)),
        lambda: read_curve(run),
    )
    with suppress(UserError):  # what a new start does, in its order
        open_folder(run, world=World())
        SkippedSteps(run / "skipped_steps.jsonl", faults=FaultsConfig(), is_first=True).before(9)
        BadList(run / "bad_samples.jsonl", is_first=True).add([("a", "b")])
        drop_later_lines(run / "metrics.jsonl", step=3)
        write_card_again(run / "encoder")


def read_encoder_folder(folder: Path) -> None:
    from cmae_scale.models.networks import build_network
    from cmae_scale.models.pretrained import open_encoder
    from cmae_scale.models.read import read_description, read_encoder

    read_all(
        lambda: read_description(folder),
        lambda: read_encoder(folder),
        lambda: build_network(open_encoder(str(folder)), img_px=32, pool="mean"),
    )


def write_card_again(folder: Path) -> None:
    from cmae_scale.models.export import write_card

    write_card(folder, "text")


def read_state(folder: Path) -> None:
    from cmae_scale.checkpoints.commit import choose_checkpoint
    from cmae_scale.checkpoints.files import CheckpointReader
    from cmae_scale.engine.checkpoint.metadata import CheckpointMetadata

    chosen = choose_checkpoint(folder, remedy="none")
    if chosen is None:
        return
    metadata = CheckpointMetadata(kind={}, ranks=1, zero_stage=0, precision="", run={})
    metadata.compare(chosen.description["stamp"], path=chosen.path, changes_allowed=True)
    state = CheckpointReader([chosen.path / name for name in sorted(chosen.description["files"])])
    for kind in ("weight", *state.optimizer_kinds):
        for name, count in state.parameters.items():
            state.read(kind, name, 0, min(count, 10**6))


def read_logs(run: Path) -> None:
    from cmae_scale.report import read_metrics, write_curves

    metrics = read_metrics(run / "metrics.jsonl")
    if not WRITTEN or metrics != WRITTEN:  # else the picture is known to work
        write_curves(run / "pictures" / "curves.png", metrics=metrics)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_run_folder_with_one_file_changed(run: Path, tmp_path: Path, data: st.DataObject) -> None:
    name, mutate = data.draw(pick(run))
    copy_fresh(run, tmp_path / "run")
    unshare(tmp_path / "run" / name)
    mutate(tmp_path / "run" / name)
    read_finished(tmp_path / "run")


@pytest.mark.slow
@FUZZ
@given(mutate=IN_JSON)
def test_an_edited_state_that_was_sealed_again(run: Path, tmp_path: Path, mutate: Mutation) -> None:
    copy_fresh(run / "checkpoints", tmp_path / "checkpoints")
    state = max((tmp_path / "checkpoints").glob("step_*"))
    for name in ("state.json", "state.sha256"):
        unshare(state / name)
    mutate(state / "state.json")
    digest = hashlib.sha256((state / "state.json").read_bytes()).hexdigest()
    (state / "state.sha256").write_text(f"{digest}  state.json\n")
    read_all(lambda: read_state(tmp_path / "checkpoints"))


@pytest.mark.slow
def test_every_file_that_a_run_leaves_is_one_that_the_next_start_tries(run: Path) -> None:
    from cmae_scale.engine.process.lifecycle import PART_FILES, PART_FOLDERS

    left = {str(path.relative_to(run)) for path in run.rglob("*") if "step_" not in str(path)}
    assert left <= {*PART_FILES, *PART_FOLDERS}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [replace_by_broken_link, Path.touch], ids=["link to nothing", "file"])
def test_states_that_cannot_be_reached_stop_the_run_and_nothing_is_dropped(
    run: Path, tmp_path: Path, let_ranks_end: Callable[..., Any], fault: Mutation
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").touch()
    fault(tmp_path / "run" / "checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def be() -> int:
        from cmae_scale.pretrain import main

        return main(["--deepspeed_config", str(run / "config.json"), "--out", str(tmp_path / "run")])

    [end] = let_ranks_end(be, ranks=1)
    assert (end.status, "cannot write into the run folder" in end.stderr) == (2, True), end.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


ODD_NAMES = [
    *("", ".", "@", "/", "weight/", "weight/a@", "weight/@0", "weight/a@-1", "weight/a@1e5", "buffer/"),
    *("weight/a@" + "9" * 5000, "weight/a@\u0663", "n" * 70_000, "\x1b[2J", "猫/猫@猫", "../../x@0"),
    *("blocks.x.norm1.weight", "blocks.-1.norm1.weight", "blocks.99999999999999999999.norm1.weight"),
    *("blocks." + "9" * 5000 + ".norm1.weight", "encoder.layer.x.y", "online_encoder.blocks..weight"),
    *("backbone.blocks.7.attn.qkv.weight", "model.pos_embed", "mask_token", "decoder_blocks.0.0.0"),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cmae_scale.config.cmae import ModelConfig, ViewsConfig
    from cmae_scale.models.build import build_encoder
    from cmae_scale.models.weights import export_encoder

    model = ModelConfig(embed_dim=24, depth=2, num_heads=2, patch_size=8)
    views = ViewsConfig(img_px=32, master_px=40, shift_px=8)
    folder = tmp_path_factory.mktemp("exported") / "encoder"
    export_encoder(build_encoder(model, img_px=32).state_dict(), folder, model=model, views=views)
    return folder


@FUZZ
@given(mutate=IN_JSON)
def test_an_encoder_whose_description_was_edited(encoder: Path, tmp_path: Path, mutate: Mutation) -> None:
    copy_fresh(encoder, tmp_path / "encoder")
    unshare(tmp_path / "encoder" / "config.json")
    mutate(tmp_path / "encoder" / "config.json")
    read_encoder_folder(tmp_path / "encoder")


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
@pytest.mark.parametrize("is_renamed", [True, False])
def test_a_tensor_of_an_odd_name(encoder: Path, tmp_path: Path, name: str, is_renamed: bool) -> None:
    from safetensors.torch import load_file, save_file

    from cmae_scale.checkpoints.files import CheckpointReader
    from cmae_scale.models.pretrained import open_encoder
    from cmae_scale.models.read import read_encoder

    shutil.copytree(encoder, tmp_path / "encoder")
    weights = tmp_path / "encoder" / "model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    tensors[name] = tensors.pop(first) if is_renamed else torch.zeros(3)
    save_file(tensors, weights)
    shutil.copy(weights, tmp_path / "alone.safetensors")
    with pytest.raises(UserError):
        read_encoder(tmp_path / "encoder")
    read_all(
        lambda: open_encoder(str(tmp_path / "encoder")),
        lambda: open_encoder(str(tmp_path / "alone.safetensors")),
    )
    share = tmp_path / "rank_00000.safetensors"
    save_file({"weight/a@0": torch.zeros(3), name: torch.zeros(3)}, share)
    with pytest.raises(UserError, match="which no state does"):
        CheckpointReader([share])
