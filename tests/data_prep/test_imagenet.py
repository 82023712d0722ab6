"""ImageNet's archives, made small: nested tars and a devkit, read where they lie."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import UserError
from cmae_scale.data.index import read_index
from cmae_scale.data.tar import read_samples
from data_prep.make_shards import main
from data_prep.sources import SOURCES, Source, SourceRequest
from data_prep.sources.imagenet import DEVKIT_NAME, TRAIN_NAME, VAL_NAME

# ILSVRC's own numbers do not follow the WordNet ids, and groups of classes stand between the classes
SYNSETS = [(1, "n03", 0), (2, "n01", 0), (3, "n02", 0), (4, "n00", 3)]
VAL_IDS = [2, 1, 3, 1, 2]  # -> labels 0 2 1 2 0


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def pack(members: Mapping[str, bytes], *, mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def pack_devkit() -> bytes:
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array([(number, wnid, children) for number, wnid, children in SYNSETS], dtype=kinds)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    truth = "\n".join(map(str, VAL_IDS)) + "\n"
    folder = "ILSVRC2012_devkit_t12/data"
    members = {
        f"{folder}/meta.mat": mat.getvalue(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    return pack(members, mode="w:gz")


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    root = tmp_path / "downloads"
    root.mkdir()
    train = {
        f"{wnid}.tar": pack({f"{wnid}_{number}.JPEG": picture(10 * label + number) for number in range(4)})
        for label, wnid in ((2, "n03"), (0, "n01"), (1, "n02"))
    }
    (root / TRAIN_NAME).write_bytes(pack(train))
    val = {f"ILSVRC2012_val_{number + 1:08d}.JPEG": picture(100 + number) for number in range(5)}
    (root / VAL_NAME).write_bytes(pack(val))
    (root / DEVKIT_NAME).write_bytes(pack_devkit())
    return root


def list_imagenet(root: Path) -> dict[str, Source]:
    return SOURCES["imagenet"](SourceRequest(root))


def test_classes_are_the_sorted_wordnet_ids_in_both_splits(archives: Path) -> None:
    splits = list_imagenet(archives)
    assert splits["train"].classes == splits["val"].classes == ("n01", "n02", "n03")
    train = [(item.name, item.label) for item in splits["train"].items]
    assert train[0] == ("n01/n01_0.jpeg", 0)
    assert train[-1] == ("n03/n03_3.jpeg", 2)
    assert [item.label for item in splits["val"].items] == [0, 2, 1, 2, 0]


def test_images_are_read_out_of_the_nested_tars(archives: Path) -> None:
    splits = list_imagenet(archives)
    train, val = splits["train"], splits["val"]
    expected = [picture(10 * label + number) for label in range(3) for number in range(4)]
    assert [train.read(item) for item in train.items] == expected
    assert [val.read(item) for item in val.items] == [picture(100 + number) for number in range(5)]


def test_the_command_writes_both_splits_and_unpacks_nothing(archives: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in archives.iterdir())
    argv = [
        "--source",
        "imagenet",
        "--root",
        str(archives),
        "--out",
        str(tmp_path / "out"),
        "--processes",
        "2",
    ]
    assert run_command(main, [*argv, "--samples_per_shard", "5"]) == 0
    assert sorted(path.name for path in archives.iterdir()) == before
    index = read_index(tmp_path / "out" / "val")
    shard = index.shards[0]
    samples = read_samples(index.path(0), first=0, count=shard.samples, expected=shard)
    originals = {picture(100 + number): label for number, label in enumerate([0, 2, 1, 2, 0])}
    assert {sample.image: sample.label for sample in samples} == originals
    assert read_index(tmp_path / "out" / "train").total == 12


def test_one_split_alone_is_enough(archives: Path) -> None:
    (archives / TRAIN_NAME).unlink()
    assert list(list_imagenet(archives)) == ["val"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (DEVKIT_NAME, None, f"not {DEVKIT_NAME}, which says its labels"),
        (DEVKIT_NAME, b"half a download", "is damaged"),
        (DEVKIT_NAME, pack({"a/data/other": b""}, mode="w:gz"), "is damaged"),
        (TRAIN_NAME, pack({"a.txt": b""}), "the train archive in .* holds no image"),
        (TRAIN_NAME, pack({"n01.tar": pack({"1.JPEG": b"x" * 9000})[:7000]}), r"n01\.tar is damaged"),
        (TRAIN_NAME, pack({"n01.tar": pack({})})[:-9000], "is damaged"),
        (VAL_NAME, pack({"ILSVRC2012_val_00000006.JPEG": b""}), "for which the devkit has no label"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # bytes of an archive are new every time
)
def test_what_is_missing_or_damaged_is_told(
    archives: Path, name: str, content: bytes | None, message: str
) -> None:
    (archives / name).unlink()
    if content is not None:
        (archives / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list_imagenet(archives)


def test_a_folder_without_the_archives_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"holds neither {TRAIN_NAME} nor {VAL_NAME}"):
        list_imagenet(tmp_path)
