"""Files of object stores and web servers, read in ranges through fsspec.

A range that fails, stalls or comes short is asked for again, so a broken transfer costs one range and never
the location in the file. While one range is read the next is on its way. Messages hold no query, user or
password of an address, and nothing of what a library says about a request: its text may hold a token.
"""

import asyncio
import errno
import importlib
import io
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.cache import ChunkCache
from cmae_scale.data.locations import read_scheme, show_location
from cmae_scale.data.remote_errors import Failure, fetch_http, fetch_s3, say_too_much, understand_error

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LOG = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 21  # of one request. Every stream of a rank holds two
AT_ONCE = 32  # requests for sizes
FIRST_PAUSE_S = 0.1  # before the first repetition; doubles each time
LONGEST_PAUSE_S = 20.0  # of those that no server asked for
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
T = TypeVar("T")


class Remote:
    """The files of one scheme. `retries` repetitions of a request, each given up after `timeout_s`."""

    def __init__(self, scheme: str, *, timeout_s: float, retries: int, cache: ChunkCache | None) -> None:
        self._files = _connect(scheme)
        self._timeout_s = timeout_s
        self._retries = retries
        self.cache = cache

    def open_file(
        self, location: str, *, max_bytes: int, end: int | None = None, version: str | None = None
    ) -> io.RawIOBase:
        """The file, read range by range. DataError if it is missing. Cached if its content has a name."""
        size = self.measure([location])[0]
        return RemoteFile(self, location, size=size, max_bytes=max_bytes, end=end, version=version)

    def measure(self, locations: Sequence[str]) -> list[int | None]:
        """Sizes as the server tells them; None where it does not. DataError if one is missing."""

        async def measure_all() -> list[int | None]:
            gate = asyncio.Semaphore(AT_ONCE)

            async def measure_one(location: str) -> int | None:
                async with gate:
                    size = (await self._repeat(location, lambda: self._info(location))).get("size")
                return size if isinstance(size, int) else None

            return list(await asyncio.gather(*map(measure_one, locations)))

        return self.start(measure_all()).result()

    def find(self, pattern: str) -> list[str]:
        """As the store lists them."""
        scheme = pattern.partition("://")[0]
        try:
            found = self._files.glob(pattern)
        except Exception as error:  # every store has errors of its own
            raise DataError(
                f"{show_location(pattern)} cannot be listed ({understand_error(error)})"
            ) from None
        return sorted(each if "://" in each else f"{scheme}://{each}" for each in found)

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run `work` beside this thread, on fsspec's event loop."""
        from fsspec.asyn import get_loop

        return asyncio.run_coroutine_threadsafe(work, get_loop())

    async def fetch(self, location: str, start: int, end: int | None, *, max_bytes: int) -> bytes:
        """Bytes `start` to `end` of a file, exactly as many; all, `max_bytes` at most, if `end` is None."""
        most = max_bytes if end is None else end - start

        async def fetch_once() -> bytes:
            data = await self._cat(location, start, end, max_bytes=most)
            if len(data) > most:
                raise say_too_much(most, is_range=end is not None)
            if end is not None and len(data) < end - start:
                raise Failure(f"{len(data)} of {end - start} bytes came")
            return data

        return await self._repeat(location, fetch_once)

    async def _repeat(self, location: str, once: Callable[[], Awaitable[T]]) -> T:
        for attempt in range(self._retries + 1):
            try:
                return await asyncio.wait_for(once(), self._timeout_s)
            except asyncio.TimeoutError:
                failure = Failure(f"nothing came for {self._timeout_s:g} s")
            except Failure as error:
                failure = error
            except Exception as error:  # every store has errors of its own
                failure = understand_error(error)
            if failure.is_missing:
                raise FileNotFoundError(errno.ENOENT, "it is not there", show_location(location))
            if failure.is_final or attempt == self._retries:
                break
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1)  # noqa: S311
            pause_s = max(pause_s, min(failure.wait_s, self._timeout_s))
            LOG.info("%s: %s, asked again in %.1f s", show_location(location), failure, pause_s)
            await asyncio.sleep(pause_s)
        raise DataError(
            f"{show_location(location)} cannot be read: {failure} (asked {attempt + 1} times): look at the "
            "server and at your permissions, or raise cmae.data.read_retries or read_timeout_s"
        )

    async def _cat(self, location: str, start: int, end: int | None, *, max_bytes: int) -> bytes:
        if read_scheme(location) in ("http", "https"):
            return await fetch_http(self._files, location, start, end, max_bytes=max_bytes)
        path = self._files._strip_protocol(location)
        if read_scheme(location) == "s3":
            return await fetch_s3(self._files, path, start, end, max_bytes=max_bytes)
        if self._files.async_impl:
            return bytes(await self._files._cat_file(path, start=start, end=end))
        # cached or not, by default fsspec fetches 5 MiB more than asked, for a reader that goes on
        read = partial(self._files.cat_file, path, start=start, end=end, cache_type="none")
        return bytes(await asyncio.to_thread(read))

    async def _info(self, location: str) -> dict[str, Any]:
        path = self._files._strip_protocol(location)
        if self._files.async_impl:
            return dict(await self._files._info(path))
        return dict(await asyncio.to_thread(self._files.info, path))


class RemoteFile(io.RawIOBase):
    """A file of a server, read in ranges that lie on a grid, so that a cache can keep them.

    Seeks cost nothing; reading on asks for the next range while this one is used. Without a cache, no byte
    before the location of a seek and none from `end` on is asked for.
    """

    def __init__(
        self,
        remote: Remote,
        location: str,
        *,
        size: int | None,
        max_bytes: int,
        end: int | None,
        version: str | None,
    ) -> None:
        self._remote = remote
        self._location = location
        self._cache = remote.cache if version is not None else None
        self._kept_as = f"{location}\n{version}"
        self._size = size
        self._max_bytes = max_bytes
        self._end = end if size is None or end is None else min(size, end)
        self._position = 0
        self._chunk = b""
        self._chunk_start = 0
        self._ahead: tuple[int, Future[bytes]] | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Asks the server for nothing."""
        if whence == io.SEEK_END and self._size is None:
            raise OSError(None, "the server does not tell the length of the file")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size or 0}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Bytes read, at least one before the end of the file."""
        view = memoryview(buffer)
        inside = self._position - self._chunk_start
        if not 0 <= inside < len(self._chunk):
            if not self._load(self._position):
                return 0
            inside = self._position - self._chunk_start
        data = self._chunk[inside : inside + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Give up what is on its way."""
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None
        self._chunk = b""
        super().close()

    def _load(self, position: int) -> bool:
        """Have the range that `position` lies in; False at the end of the file."""
        if self._size is None:  # a server that tells no length sends the whole file
            self._chunk, self._chunk_start = self._fetch(0, None).result(), 0
            self._size = self._end = len(self._chunk)
            return position < self._size
        if position >= self._size:
            return False
        start = position if self._cache is None else position // CHUNK_BYTES * CHUNK_BYTES
        if self._ahead is not None and self._ahead[0] != start:
            self._ahead[1].cancel()
            self._ahead = None
        future = self._ask(start) if self._ahead is None else self._ahead[1]
        self._ahead = None
        self._chunk, self._chunk_start = future.result(), start
        following = start + len(self._chunk)
        if following < (self._size if self._end is None else self._end):
            self._ahead = following, self._ask(following)
        return True

    def _ask(self, start: int) -> "Future[bytes]":
        """Begin to fetch from `start` to the next line of the grid."""
        assert self._size is not None
        end = min(self._size, (start // CHUNK_BYTES + 1) * CHUNK_BYTES)
        if self._cache is None:
            if self._end is not None and start < self._end:
                end = min(end, self._end)
            return self._fetch(start, end)
        return self._remote.start(self._fetch_cached(self._cache, start, end))

    def _fetch(self, start: int, end: int | None) -> "Future[bytes]":
        return self._remote.start(self._remote.fetch(self._location, start, end, max_bytes=self._max_bytes))

    async def _fetch_cached(self, cache: ChunkCache, start: int, end: int) -> bytes:
        data = await asyncio.to_thread(cache.read, self._kept_as, start, end - start)
        if data is None:
            data = await self._remote.fetch(self._location, start, end, max_bytes=self._max_bytes)
            await asyncio.to_thread(cache.write, self._kept_as, start, data)
        return data


def _connect(scheme: str) -> Any:
    """fsspec's file system for a scheme. ConfigError that names the extra if a package is missing."""
    try:
        fsspec = importlib.import_module("fsspec")
        importlib.import_module(PACKAGES[scheme])
        options = {"skip_instance_cache": True, "use_listings_cache": False}
        if scheme == "gs":  # the class behind gs:// asks what kind of bucket it is, and warns if it may not
            return importlib.import_module("gcsfs.core").GCSFileSystem(**options)
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        raise ConfigError(
            f"reading {scheme}:// needs packages that are missing: pip install fsspec {PACKAGES[scheme]} "
            '(or "cmae-scale[remote]" for all schemes)'
        ) from None
