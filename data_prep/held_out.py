"""Images held out for validation, chosen by their content: adding images moves none of the others."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import compress

import numpy as np
from jaxtyping import Bool

from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.core.files import PART, remove, write_whole
from data_prep.arguments import Command
from data_prep.listing import Item, Listing
from data_prep.locks import hold_merge
from data_prep.manifest import SCRATCH, open_reader
from data_prep.reporting import Progress
from data_prep.sources import Source
from data_prep.sources.splits import read_split
from data_prep.unlisted import Unlisted

NAME = ".held_out"
AT_ONCE = 4096  # items that the threads get to read together
PERSON = b"held out"  # keeps these digests apart from others of the same bytes


def hold_out(splits: dict[str, Source], fraction: float, *, command: Command) -> dict[str, Source]:
    """The splits with one more, val, taken out of the only one or of train.

    Each image is held out with probability `fraction`, by a digest of its bytes alone: of each class about as
    many, equal files on the same side, and the same ones whatever is added or renamed. (An exact number of
    each class would have to move images whenever one is added.) Costs a reading of all images; what comes
    out is kept in --out, for other parts and later runs.
    """
    roles = {split: read_split(split) for split in splits}
    if any(each is not None and each.role == "val" for each in roles.values()):
        raise ConfigError(f"the source has splits already ({', '.join(splits)}): leave out --val_fraction")
    trains = [split for split, each in roles.items() if each is not None and each.role == "train"]
    name = next(iter(trains if len(splits) > 1 else splits), None)
    if name is None:
        raise ConfigError(f"--val_fraction finds no train among the splits {', '.join(splits)}")
    source = splits[name]
    is_val = _choose(source, fraction, command=command)
    if is_val.all() or not is_val.any():
        raise ConfigError(
            f"--val_fraction {fraction:g} leaves no image for one side: of {source.title}'s "
            f"{len(source.items):,} it holds out {is_val.sum():,}"
        )
    train = replace(source, title=f"{source.title} train", items=Listing(compress(source.items, ~is_val)))
    val = replace(
        source,
        title=f"{source.title} val",
        items=Listing(compress(source.items, is_val)),
        unlisted=Unlisted(),
        notes=(),
    )
    return {(split or "train"): each for split, each in {**splits, name: train}.items()} | {"val": val}


def _choose(source: Source, fraction: float, *, command: Command) -> Bool[np.ndarray, " items"]:
    """Whether each item is held out. A part that comes while another looks waits for what that one finds."""
    out, count = command.out, len(source.items)
    path = out / f"{NAME}-{fraction:g}-{source.items.digest[:16]}"
    out.mkdir(parents=True, exist_ok=True)
    with hold_merge(out):
        if not path.exists():
            for left in (*out.glob(f"{SCRATCH}*"), *out.glob(f"{NAME}*{PART}")):  # by a run that was killed
                remove(left)
            with open_reader(source, source.items, out=out, part=command.part) as read:
                found = _find_held_out(source.items, read, fraction=fraction, command=command)
                bits = np.packbits(np.fromiter(found, dtype=bool, count=count))
            with write_whole(path) as file:
                file.write(bits.tobytes())
    return np.unpackbits(np.frombuffer(path.read_bytes(), dtype=np.uint8), count=count).astype(bool)


def _find_held_out(
    items: Listing, read: Callable[[Item], bytes], *, fraction: float, command: Command
) -> Iterator[bool]:
    """Reads all items, several at a time. One that cannot be read stays in train, which says so."""

    def is_held_out(item: Item) -> bool:
        try:
            digest = hashlib.blake2b(read(item), digest_size=8, person=PERSON).digest()
        except (DataError, OSError):
            return False
        return int.from_bytes(digest, "big") < fraction * 2**64

    progress = Progress(len(items), doing=f"{command.out}: reading all images once, to hold some out")
    with progress.bar, ThreadPoolExecutor(command.processes) as threads:
        for first in range(0, len(items), AT_ONCE):
            batch = items[first : first + AT_ONCE]
            yield from threads.map(is_held_out, batch)
            progress.add(len(batch))
