"""What servers answer: ranges of a web server, bounded while they arrive, and what went wrong, in words.

Errors come from aiohttp, gcsfs, huggingface_hub and botocore. Of their texts nothing is shown: they may hold
a token.
"""

import contextlib
import email.utils
import re
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timezone
from typing import Any

READ_BYTES = 1 << 18
REFUSALS = (FileNotFoundError, PermissionError, NotImplementedError)  # asking again does not help
REFUSED_STATUS = frozenset(
    (401, 403, 404, 405, 410, 416)
)  # of HTTP, the same. aiohttp calls a cut answer 400


class Failure(Exception):  # noqa: N818 -- becomes a DataError or OSError where the location is known
    """Why a request gave nothing, in words that may be shown.

    `is_final` if asking again cannot help. `wait_s` is how long the server wants to be left alone.
    """

    def __init__(
        self, reason: str, *, is_final: bool = False, is_missing: bool = False, wait_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.is_final = is_final
        self.is_missing = is_missing
        self.wait_s = wait_s


async def fetch_http(files: Any, address: str, start: int, end: int | None, *, max_bytes: int) -> bytes:
    """Bytes `start` to `end` of a file of fsspec's HTTP file system (all of it if `end` is None).

    Failure as soon as more than `max_bytes` have come, and for an answer that the server compresses: what
    that unpacks to has no bound, and no range of it is a range of the file.
    """
    headers = {"Accept-Encoding": "identity"}
    if end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    session = await files.set_session()
    async with session.get(files.encode_url(address), headers=headers) as answer:
        answer.raise_for_status()
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise Failure("it compresses what it sends (turn that off for .tar and .json)", is_final=True)
        return await _collect(answer.content.iter_any(), max_bytes=max_bytes, is_range=end is not None)


async def fetch_s3(files: Any, path: str, start: int, end: int | None, *, max_bytes: int) -> bytes:
    """The same of a file of s3fs, whose own way to read one holds whatever comes."""
    bucket, key, version = files.split_path(path)
    asked = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
    if version:
        asked["VersionId"] = version
    answer = await files._call_s3("get_object", Bucket=bucket, Key=key, **asked)
    with contextlib.closing(answer["Body"]) as body:
        parts = body.iter_chunks(READ_BYTES)
        return await _collect(parts, max_bytes=max_bytes, is_range=end is not None)


async def _collect(parts: AsyncIterator[bytes], *, max_bytes: int, is_range: bool) -> bytes:
    data = bytearray()
    async for part in parts:
        data += part
        if len(data) > max_bytes:
            raise say_too_much(max_bytes, is_range=is_range)
    return bytes(data)


def say_too_much(max_bytes: int, *, is_range: bool) -> Failure:
    """The failure of a server that sends more than it was asked for, or than there should be."""
    if is_range:
        return Failure("it sends whole files where a range was asked for", is_final=True)
    return Failure(f"it sends more than the {max_bytes} bytes that can be", is_final=True)


def understand_error(error: BaseException) -> Failure:
    """The failure that an error of some library stands for."""
    cause = _find_cause(error)
    status = read_status(cause)
    reason = type(cause).__name__ + (f", status {status}" if status else "")
    return Failure(
        reason,
        is_final=isinstance(cause, REFUSALS) or status in REFUSED_STATUS,
        is_missing=isinstance(cause, FileNotFoundError) or status in (404, 410),
        wait_s=read_wait(_read_headers(cause), now=datetime.now(timezone.utc)),
    )


def read_status(error: BaseException) -> int | None:
    """From aiohttp, gcsfs (`status`, `code`), huggingface_hub (`response`) and botocore's errors alike."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", getattr(error, "status", None))
        if status is None:
            status = getattr(error, "code", None)
    return status if isinstance(status, int) else None


def read_wait(headers: Mapping[str, str], *, now: datetime) -> float:
    """Seconds that a server asks to wait, by its header Retry-After; 0 if it says none that makes sense.

    Source: RFC 9110, section 10.2.3: a number of seconds or a date.
    """
    text = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return max(0.0, (moment - now).total_seconds())
    except (TypeError, ValueError, OverflowError):  # no date, or one without a zone
        return 0.0


def _find_cause(error: BaseException) -> BaseException:
    """What is behind an error: fsspec reports a web server's every failure as a missing file."""
    return error if error.__cause__ is None else error.__cause__


def _read_headers(error: BaseException) -> Mapping[str, str]:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    else:
        headers = getattr(response, "headers", getattr(error, "headers", None))
    return headers if isinstance(headers, Mapping) else {}
