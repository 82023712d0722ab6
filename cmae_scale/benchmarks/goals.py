"""What a record of bench gpu comes to beside the goals that the project has set itself for a Hopper card."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by part and name


class Goal(NamedTuple):
    """`found` is None where the record does not tell."""

    name: str
    bound: float
    found: float | None
    is_ceiling: bool = False

    @property
    def is_met(self) -> bool | None:
        """Whether `found` is at least `bound`, or at most, where that is a ceiling."""
        if self.found is None:
            return None
        return self.found <= self.bound if self.is_ceiling else self.found >= self.bound

    def __str__(self) -> str:
        """For instance: "ViT-L, share of the peak: 0.31, goal at least 0.56, missed by 45 %"."""
        limit = f"goal at {'most' if self.is_ceiling else 'least'} {self.bound:g}"
        if self.found is None:
            return f"{self.name}: not measured, {limit}"
        off = abs(self.found / self.bound - 1) if self.bound else self.found
        verdict = "met" if self.is_met else f"missed by {off:.0%}" if self.bound else "missed"
        return f"{self.name}: {self.found:.3g}, {limit}, {verdict}"


def judge(results: Results) -> list[Goal]:
    """Every goal beside the best that the record has for it.

    Source of the bounds: published training runs on Hopper and the roofline of the method's operations; the
    share of the peak counts the floating-point operations that the method needs, once.
    """
    steps, kernels = results.get("steps", {}), results.get("kernels", {})
    waits = results.get("waits", {}).get("a step", {}).get("waits")
    return [
        *(
            Goal(f"ViT-{size[-1].upper()}, share of the peak", bound, _best(steps, size, "mfu"))
            for size, bound in (("vits", 0.40), ("vitb", 0.50), ("vitl", 0.56))
        ),
        Goal("with the loader, share of ViT-S steps without", 0.90, _share_with_loader(results)),
        Goal("views, us an image", 8.0, _least(steps, "ms_augment"), is_ceiling=True),
        Goal("waits of a step for the GPU", 1.0, waits, is_ceiling=True),
        Goal("memory, beside what plan says", 1.05, _worst_memory(steps), is_ceiling=True),
        Goal("attention, torch's pick beside the best", 1.02, _worst_pick(kernels), is_ceiling=True),
    ]


def _of(steps: Mapping[str, Mapping[str, Any]], run_file: str) -> Iterator[Mapping[str, Any]]:
    for name, figures in steps.items():
        if name.split(",")[0] == run_file and "failed" not in figures:
            yield figures


def _best(steps: Mapping[str, Mapping[str, Any]], run_file: str, key: str) -> float | None:
    return max((figures[key] for figures in _of(steps, run_file) if key in figures), default=None)


def _least(steps: Mapping[str, Mapping[str, Any]], span: str) -> float | None:
    """Microseconds of an image in a span of the step, where that is least."""
    found = [
        1e3 * figures["spans"][span] * 1e3 / (figures["images_per_s"] * figures["ms_per_step"])
        for figures in steps.values()
        if span in figures.get("spans", {})
    ]
    return min(found, default=None)


def _share_with_loader(results: Results) -> float | None:
    loaded = [one["images_per_s"] for one in results.get("loader", {}).values() if "images_per_s" in one]
    plain = results.get("steps", {}).get("vits, 128 x 1", {}).get("images_per_s")
    return max(loaded) / plain if loaded and plain else None


def _worst_memory(steps: Mapping[str, Mapping[str, Any]]) -> float | None:
    found = [one["peak_gib"] / one["predicted_gib"] for one in steps.values() if one.get("peak_gib")]
    return max(found, default=None)


def _worst_pick(kernels: Mapping[str, Mapping[str, Any]]) -> float | None:
    found = []
    for figures in kernels.values():
        own = figures.get("torch's pick")
        others = [value for name, value in figures.items() if name != "torch's pick" and value]
        if own and others:
            found.append(own / min(others))
    return max(found, default=None)
