import pytest

from cmae_scale.config.batches import BatchSizes, plan_batch
from cmae_scale.core.errors import ConfigError

TOTAL, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ({TOTAL: 4096, MICRO: 128, STEPS: "auto"}, 8, BatchSizes(4096, 128, 4)),
        ({TOTAL: 4096, MICRO: 128}, 32, BatchSizes(4096, 128, 1)),
        ({TOTAL: 64, MICRO: "auto", STEPS: 1}, 2, BatchSizes(64, 32, 1)),
        ({TOTAL: 64}, 4, BatchSizes(64, 16, 1)),
        ({MICRO: 8, STEPS: 2}, 3, BatchSizes(48, 8, 2)),
        ({TOTAL: "auto", MICRO: 8}, 3, BatchSizes(24, 8, 1)),
    ],
)
def test_what_is_missing_follows_from_the_rest(
    sizes: dict[str, object], ranks: int, expected: BatchSizes
) -> None:
    assert plan_batch(sizes, ranks=ranks) == expected


@pytest.mark.parametrize(
    ("sizes", "ranks", "remedy"),
    [
        ({TOTAL: 4096, MICRO: 100}, 8, f"write {MICRO}=64 and {STEPS}=8"),
        ({TOTAL: 4096, MICRO: 128, STEPS: 3}, 8, f"write {MICRO}=128 and {STEPS}=4"),
        ({TOTAL: 64, MICRO: 64}, 2, f"write {MICRO}=32 and {STEPS}=1"),
        ({TOTAL: 64}, 3, f"3 ranks do not divide 64, write {TOTAL}=63"),
        ({TOTAL: 2}, 4, f"4 ranks do not divide 2, write {TOTAL}=4"),
        ({}, 1, "must be a number"),
        ({TOTAL: "64"}, 1, "whole number of at least 1"),
        ({TOTAL: 0}, 1, "whole number of at least 1"),
    ],
)
def test_sizes_that_do_not_multiply_come_with_sizes_that_do(
    sizes: dict[str, object], ranks: int, remedy: str
) -> None:
    with pytest.raises(ConfigError) as error:
        plan_batch(sizes, ranks=ranks)
    assert remedy in str(error.value)
