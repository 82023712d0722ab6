"""Writing one shard, and many of them in several processes. A shard depends on its task and nothing else."""

import hashlib
import io
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from cmae_scale.core.errors import DataError
from cmae_scale.core.files import PART, sync
from cmae_scale.data.decode import decode_image, image_extension, open_image
from cmae_scale.data.index import ShardInfo
from data_prep.layout import Options, ShardTask
from data_prep.ledger import WrittenShard, record_shard
from data_prep.sources import Item

MAX_MPX = 178.0  # Pillow opens nothing larger (twice its MAX_IMAGE_PIXELS). Training has its own, lower limit


@dataclass(frozen=True)
class ShardWriter:
    """Everything that the shards of one folder have in common. Travels to the worker processes."""

    out: Path
    read: Callable[[Item], bytes]
    options: Options
    skip_bad: bool

    def write(self, task: ShardTask) -> WrittenShard:
        """Write the shard of `task` and a record of it. A bad item is a DataError unless `skip_bad`."""
        skipped: list[str] = []
        with _write_whole(self.out / task.name) as file:
            hashed = _HashedFile(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                for position, item in enumerate(task.items, start=task.first):
                    try:
                        image = encode(_read(self.read, item), self.options)
                    except DataError as error:
                        if not self.skip_bad:
                            raise DataError(f"{item.name}: {error} (--skip_bad leaves it out)") from None
                        skipped.append(f"{item.name}: {error}")
                    else:
                        _add_sample(tar, image, key=f"{position:09d}", label=item.label)
        samples = len(task.items) - len(skipped)
        info = ShardInfo(task.name, samples, hashed.size, hashed.digest.hexdigest())
        written = WrittenShard(info, tuple(skipped))
        record_shard(self.out, written)
        return written


def write_shards(
    writer: ShardWriter, tasks: Sequence[ShardTask], *, processes: int
) -> Iterator[WrittenShard]:
    """Each shard as it is finished, in any order. The first error ends all."""
    if processes == 1 or len(tasks) <= 1:
        yield from map(writer.write, tasks)
        return
    pool = ProcessPoolExecutor(
        max_workers=min(processes, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    )
    try:
        with _inherit_no_interrupt():  # processes start while tasks are submitted
            futures = [pool.submit(writer.write, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            "a writing process was killed (out of memory?): run the same command with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode(data: bytes, options: Options) -> bytes:
    """The bytes to store: the original ones wherever possible. Raises DataError if they are no image."""
    if options.resize_short is None:
        open_image(data, max_mpx=MAX_MPX)
        return data
    image = decode_image(data, max_mpx=MAX_MPX)
    short = min(image.size)
    if short <= options.resize_short:
        return data
    width, height = (round(side * options.resize_short / short) for side in image.size)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=options.quality)
    return file.getvalue()


class _HashedFile:
    """The part of a file that tarfile writes to; knows size and SHA-256 of what passed through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


@contextmanager
def _write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` when the block ends well, complete and on disk, and not otherwise.

    The part is named after its process: one that outlives its killed parent for a moment meets no other.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _read(read: Callable[[Item], bytes], item: Item) -> bytes:
    try:
        return read(item)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None


def _add_sample(tar: tarfile.TarFile, image: bytes, *, key: str, label: int | None) -> None:
    _add_member(tar, f"{key}.{image_extension(image)}", image)
    if label is not None:
        _add_member(tar, f"{key}.cls", str(label).encode())


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # no time and no owner: the same input gives the same bytes
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


@contextmanager
def _inherit_no_interrupt() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; those started here leave it to their parent to end them."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _end_with_parent() -> None:
    """A killed parent cannot stop its pool: each worker watches for that itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
