"""ImageNet (ILSVRC 2012) as its own archives hold it: a tar of class tars, and a flat tar with a devkit."""

import functools
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.tar import list_members
from cmae_scale.data.tar_headers import Member
from data_prep.listing import Item, Listing
from data_prep.sources.members import Window, open_archive, read_member
from data_prep.sources.source import IMAGE_ENDINGS, Source, SourceRequest, existing_folder, show_path
from data_prep.unlisted import Unlisted, say_other_file

# Source: image-net.org, "ILSVRC2012 downloads"
TRAIN_NAME = "ILSVRC2012_img_train.tar"
VAL_NAME = "ILSVRC2012_img_val.tar"
DEVKIT_NAME = "ILSVRC2012_devkit_t12.tar.gz"
LABELS_NAME = "data/ILSVRC2012_validation_ground_truth.txt"
SYNSETS_NAME = "data/meta.mat"


def list_imagenet(request: SourceRequest) -> dict[str, Source]:
    """The archives that ROOT holds, train and val. Nothing is unpacked.

    Classes are the WordNet ids in sorted order, for both, as the unpacked image folder would number them.
    """
    root = existing_folder(request, "imagenet")
    splits: dict[str, Source] = {}
    if (root / TRAIN_NAME).exists():
        splits["train"] = _list_train(root / TRAIN_NAME)
    if (root / VAL_NAME).exists():
        if not (root / DEVKIT_NAME).exists() and not request.no_labels:
            raise ConfigError(f"{root} holds {VAL_NAME} but not {DEVKIT_NAME}, which says its labels: add it")
        splits["val"] = _list_val(root / VAL_NAME, None if request.no_labels else root / DEVKIT_NAME)
    if not splits:
        raise ConfigError(
            f"--root {root} holds neither {TRAIN_NAME} nor {VAL_NAME}: name the folder of the downloaded "
            "archives, or write --source imagefolder for unpacked ones"
        )
    for split, source in splits.items():
        if not source.items:
            raise ConfigError(f"the {split} archive in {root} holds no image")
    return splits


def _list_train(path: Path) -> Source:
    unlisted = Unlisted()
    with open_archive(str(path)) as file:
        class_tars = sorted(_only(list_members(file, name=str(path)), (".tar",), path.name, unlisted))
        classes = tuple(member.key for member in class_tars)
        if len(set(classes)) < len(classes):
            raise DataError(f"{path} holds a class twice: download it again")
        items = Listing(
            Item(
                f"{class_tar.key}/{image.key}.{image.ending}",
                label,
                (0, class_tar.data + image.data, image.size),
            )
            for label, class_tar in enumerate(class_tars)
            for image in _list_class(file, class_tar, unlisted)
        )
    return _build_source(path, items, classes, unlisted)


def _list_class(file: BinaryIO, class_tar: Member, unlisted: Unlisted) -> Iterator[Member]:
    window = Window(file, offset=class_tar.data, size=class_tar.size)
    with io.BufferedReader(window, tarfile.BLOCKSIZE) as inner:
        members = list_members(inner, name=f"{class_tar.key}.tar")
        yield from _only(members, IMAGE_ENDINGS, class_tar.key, unlisted)


def _list_val(path: Path, devkit: Path | None) -> Source:
    classes, labels = ((), None) if devkit is None else read_devkit(devkit)
    unlisted = Unlisted()
    with open_archive(str(path)) as file:
        items = Listing(
            Item(f"{image.key}.{image.ending}", _label(image.key, labels), (0, image.data, image.size))
            for image in _only(list_members(file, name=str(path)), IMAGE_ENDINGS, path.name, unlisted)
        )
    return _build_source(path, items, classes, unlisted)


def _build_source(path: Path, items: Listing, classes: tuple[str, ...], unlisted: Unlisted) -> Source:
    read = functools.partial(read_member, (str(path),))
    return Source(f"imagenet {show_path(path)}", items, classes, read, unlisted=unlisted)


def _only(
    members: Iterator[Member], endings: tuple[str, ...], place: str, unlisted: Unlisted
) -> Iterator[Member]:
    for member in members:
        if f".{member.ending}" in endings:
            yield member
        else:
            name = f"{member.key}.{member.ending}"
            unlisted.add(f"{place}/{name}", say_other_file(name))


def _label(key: str, labels: list[int] | None) -> int | None:
    if labels is None:
        return None
    number = re.search(r"_(\d+)$", key)
    if number is None or not 1 <= int(number[1]) <= len(labels):
        raise DataError(f"{VAL_NAME} holds {key}, for which the devkit has no label: download both again")
    return labels[int(number[1]) - 1]


def read_devkit(path: Path) -> tuple[tuple[str, ...], list[int]]:
    """The sorted WordNet ids, and the label of each validation image in the order of their numbers.

    The devkit numbers classes its own way (ILSVRC2012_ID, 1 to 1000, in meta.mat).
    """
    from scipy.io import loadmat  # comes with scikit-learn; slow to import

    try:
        with tarfile.open(path, "r:gz") as tar:
            texts = {name: _read_text(tar, name) for name in (LABELS_NAME, SYNSETS_NAME)}
        synsets = np.atleast_1d(loadmat(io.BytesIO(texts[SYNSETS_NAME]), squeeze_me=True)["synsets"])
        ids = {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
            for synset in synsets
            if int(synset["num_children"]) == 0  # the others are groups of classes
        }
        classes = tuple(sorted(ids.values()))
        numbers = {ilsvrc_id: classes.index(wordnet_id) for ilsvrc_id, wordnet_id in ids.items()}
        return classes, [numbers[int(line)] for line in texts[LABELS_NAME].split()]
    except (tarfile.TarError, EOFError, zlib.error, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): download it again") from None


def _read_text(tar: tarfile.TarFile, ending: str) -> bytes:
    for member in tar:
        if member.name.endswith(f"/{ending}") and (file := tar.extractfile(member)) is not None:
            return file.read()
    raise KeyError(ending)
