"""The shards that a run reads, of one folder or of many, and pairs of labelled sets with the same classes."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256

from cmae_scale.config.cmae import CmaeConfig, DataConfig
from cmae_scale.core.credentials import fill_in
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.decode import GreyRange
from cmae_scale.data.index import (
    INDEX_NAME,
    ShardInfo,
    check_size,
    missing_index,
    parse_text,
    read_value_range,
    reads_by_stem,
)
from cmae_scale.data.locations import (
    COMMAND,
    expand_braces,
    join_location,
    read_scheme,
    show_location,
    split_location,
)
from cmae_scale.data.offsets import offsets_name, read_offsets
from cmae_scale.data.storage import Storage, find_locations, open_storage, read_text
from cmae_scale.data.tar import MAX_LABEL, RawSample, read_samples


@dataclass(frozen=True)
class Shard:
    """One tar. `name` is unique in its set and free of secrets, for messages and the keys of samples.

    A label must be below `classes`. `by_stem`: see tar. `grey_range`: see decode.scale_grey.
    """

    folder: str
    name: str
    info: ShardInfo
    storage: Storage = field(repr=False)
    has_labels: bool = True
    classes: int = MAX_LABEL + 1
    by_stem: bool = False
    grey_range: GreyRange | None = None

    @property
    def location(self) -> str:
        """What to open."""
        return join_location(self.folder, self.info.name)

    def read(self, first: int, count: int) -> Iterator[RawSample]:
        """Samples number `first` to `first + count`, without labels if the set has none (see tar).

        DataError for a label that no class has: whoever counts by class would write beside the counts.
        """
        offsets = None
        if count < self.info.samples:
            location = join_location(self.folder, offsets_name(self.info.name))
            offsets = read_offsets(self.storage, location, expected=self.info)
        samples = read_samples(
            self.location,
            first=first,
            count=count,
            expected=self.info,
            storage=self.storage,
            offsets=offsets,
            by_stem=self.by_stem,
        )
        for sample in samples:
            if not self.has_labels:
                yield sample._replace(label=None)
            elif sample.label is not None and sample.label >= self.classes:
                raise DataError(
                    f"{self.name}: sample '{sample.key}' has label {sample.label}, the {INDEX_NAME} names "
                    f"{self.classes} classes: look at the folder with check_shards, or make the shards again"
                )
            else:
                yield sample


@dataclass(frozen=True)
class ShardSet:
    """All shards in their fixed order. `classes` is None when sets of different classes are mixed.

    `parts` says how many shards belong to each entry of cmae.data.shards, for mixing them by weight.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    parts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Samples in all shards."""
        return sum(shard.info.samples for shard in self.shards)

    def fingerprint(self) -> str:
        """The same for the same shards wherever they lie: a hash of all that their indexes say."""
        told = [(shard.info, shard.has_labels, shard.by_stem, shard.grey_range) for shard in self.shards]
        return sha256(repr((told, self.classes, self.parts)).encode()).hexdigest()

    def describe(self) -> str:
        """The folders, for messages."""
        return ", ".join(dict.fromkeys(show_location(shard.folder) for shard in self.shards))


def open_shards(locations: str | Sequence[str], *, data: DataConfig, measure: bool = True) -> ShardSet:
    """The shards of the setting cmae.data.shards (or val_shards), each there and of the right size.

    Without `measure` only their indexes are read, and none is asked for its size.
    Raises DataError when an index or a shard is missing, or when folders that are to be one data set have
    other classes; ConfigError for locations that cannot be read at all.
    """
    entries = [locations] if isinstance(locations, str) else list(locations)
    parts = [list(_read_entry(entry, data=data)) for entry in entries]
    folders = [folder for part in parts for folder in part]
    is_mixed = data.mix is not None and not isinstance(locations, str)
    same_classes = all(folder.classes == folders[0].classes for folder in folders)
    if not same_classes and not is_mixed:
        other = next(folder for folder in folders if folder.classes != folders[0].classes)
        raise DataError(
            f"{show_location(other.location)} has other classes than {show_location(folders[0].location)} "
            f"({tell_apart(other.classes, folders[0].classes)}): they cannot be one data set (with "
            "cmae.data.mix they can, without labels)"
        )
    names = _distinguish([folder.location for folder in folders])
    shards = [
        Shard(
            folder.location,
            names[folder.location] + info.name,
            info,
            folder.storage,
            has_labels=same_classes and bool(folder.classes),
            classes=len(folder.classes),
            by_stem=folder.by_stem,
            grey_range=folder.grey_range,
        )
        for folder in folders
        for info in folder.shards
    ]
    if len({shard.location for shard in shards}) < len(shards):
        raise ConfigError(f"cmae.data.shards names a shard twice: {', '.join(map(show_location, entries))}")
    if measure:
        _check_sizes(folders)
    return ShardSet(
        tuple(shards),
        classes=folders[0].classes if same_classes else None,
        parts=tuple(sum(len(folder.shards) for folder in part) for part in parts),
    )


@dataclass(frozen=True)
class _Folder:
    """A folder and those of its shards that were asked for."""

    location: str
    storage: Storage
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...]
    by_stem: bool
    grey_range: GreyRange | None


def _read_entry(entry: str, *, data: DataConfig) -> Iterator[_Folder]:
    """The folders of one entry, which may name variables of the environment.

    A pattern that ends in .tar names shards of a folder's index.
    """
    entry = fill_in(entry)
    storage = open_storage(entry, data)
    chosen: dict[str, list[str]] = {}  # tars by folder; none named means all
    for location in expand_braces(entry):
        names: list[str] = []
        if location.endswith(".tar") and read_scheme(location) != COMMAND:
            location, name = split_location(location)
            names.append(name)
        for folder in find_locations(storage, location):
            chosen.setdefault(folder, []).extend(names)
    for folder, names in chosen.items():
        yield _read_folder(folder, names, storage=storage)


def _read_folder(location: str, names: list[str], *, storage: Storage) -> _Folder:
    index_location = join_location(location, INDEX_NAME)
    text = read_text(storage, index_location)
    if text is None:
        raise missing_index(show_location(location))
    index = parse_text(text, name=show_location(index_location))
    shards = index.shards
    if names:
        shown = show_location(index_location)
        for name in names:
            if not any(fnmatchcase(shard.name, name) for shard in shards):
                raise DataError(f"{shown} lists no shard {name}: look at cmae.data.shards")
        shards = tuple(shard for shard in shards if any(fnmatchcase(shard.name, name) for name in names))
    return _Folder(
        location,
        storage,
        shards,
        index.classes,
        by_stem=reads_by_stem(index.options),
        grey_range=read_value_range(index.options, name=show_location(index_location)),
    )


def _check_sizes(folders: Sequence[_Folder]) -> None:
    for folder in folders:
        locations = [join_location(folder.location, shard.name) for shard in folder.shards]
        try:
            sizes = folder.storage.measure(locations)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} is missing: copy it again, or make the shards again") from None
        for location, size, shard in zip(locations, sizes, folder.shards, strict=True):
            check_size(show_location(location), size, expected=shard)


def _distinguish(locations: Sequence[str]) -> dict[str, str]:
    """What the names of each folder's shards begin with: nothing for a lone one, else the difference."""
    shown = {location: show_location(location) for location in locations}
    if len(shown) == 1:
        return dict.fromkeys(shown, "")
    try:
        shared = posixpath.commonpath(list(shown.values()))
    except ValueError:  # paths from the root and from here
        shared = ""
    return {
        location: f"{posixpath.relpath(one, shared) if shared else one}/" for location, one in shown.items()
    }


def tell_apart(classes: Sequence[str], others: Sequence[str]) -> str:
    """For a message: which classes of `others` are lacking in `classes`, and which it has besides."""
    lacking = _name_first([name for name in others if name not in set(classes)])
    besides = _name_first([name for name in classes if name not in set(others)])
    if lacking and besides:
        return f"it lacks {lacking}, and has {besides} besides"
    if lacking or besides:
        return f"it lacks {lacking}" if lacking else f"it has {besides} besides"
    return "the same names in another order"


def _name_first(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"'{names[0]}'" + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


@dataclass(frozen=True)
class Labelled:
    """Training and validation shards with the same classes."""

    train: ShardSet
    val: ShardSet
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """That of both sets."""
        return self.train.fingerprint() + self.val.fingerprint()


def open_labelled(
    train: str | Sequence[str], val: str | Sequence[str], *, data: DataConfig, measure: bool = True
) -> Labelled:
    """Both sets. Raises DataError where classes are missing or differ. `measure` is that of `open_shards`."""
    shards, val_shards = (open_shards(locations, data=data, measure=measure) for locations in (train, val))
    if not shards.classes:
        raise DataError(
            f"{shards.describe()} has no classes: make its shards with --source imagefolder from a folder of "
            "class folders"
        )
    if shards.classes != val_shards.classes:
        raise DataError(
            f"{val_shards.describe()} has other classes than {shards.describe()} "
            f"({tell_apart(val_shards.classes or (), shards.classes)}): make it again with --classes and the "
            "folder of the training shards"
        )
    return Labelled(shards, val_shards, shards.classes)


def find_monitored(cfg: CmaeConfig) -> tuple[str | tuple[str, ...], str | tuple[str, ...]]:
    """Where the kNN monitor's voting and held-out shards are. ConfigError where nothing is held out."""
    knn = cfg.monitor.knn
    assert knn is not None
    val = knn.val_shards or cfg.data.val_shards
    if val is None:
        raise ConfigError("cmae.monitor.knn needs held-out images: write its val_shards, or data.val_shards")
    return knn.shards or cfg.data.shards, val
