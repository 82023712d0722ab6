"""The account of images that could not be decoded, and the limit at which a run should rather stop."""

import logging
import threading

from cmae_scale.core.errors import DataError
from cmae_scale.core.terminal import make_safe

LOG = logging.getLogger(__name__)
GRACE_SAMPLES = 10_000  # a share says nothing before this many: one bad image among the first 64 is no 1.5 %
SHOWN = 5


class BadSamples:
    """How often a bad image came up, and which ones they are. Threads may add at the same time."""

    def __init__(
        self, max_fraction: float, *, consequence: str = "another of its shard takes its place"
    ) -> None:
        self.max_fraction = max_fraction
        self.consequence = consequence
        self.count = 0
        self.reasons: dict[str, str] = {}  # by sample, in the order first seen
        self._new: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def add(self, key: str, reason: str) -> None:
        """Count the sample `key` ("shard/key"). Logged the first time only, for it returns in every epoch."""
        with self._lock:
            self.count += 1
            is_new = key not in self.reasons
            if is_new:
                self.reasons[key] = reason
                self._new.append((key, reason))
        if is_new:
            LOG.warning(make_safe(f"bad sample {key}: {reason} ({self.consequence})"))

    def take_new(self) -> list[tuple[str, str]]:
        """Samples and reasons that were not taken before."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def check(self, count: int, *, seen: int) -> None:
        """Raise DataError when `count` bad ones are more than `max_fraction` of `seen` samples.

        Both are of all ranks, so that all raise at the same step.
        """
        if count > self.max_fraction * max(seen, GRACE_SAMPLES):
            shown = "; ".join(f"{key}: {reason}" for key, reason in list(self.reasons.items())[:SHOWN])
            raise DataError(
                f"{count} of {seen} samples could not be decoded ({shown or 'by other ranks'}): see "
                "bad_samples.jsonl in the run folder, run check_shards.py, or raise "
                f"cmae.data.max_bad_fraction ({self.max_fraction:g})"
            )
