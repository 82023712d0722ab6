"""The plan against a list: build the epoch's order the slow way, then ask for every row."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmae_scale.core.errors import ConfigError
from cmae_scale.data.mix import MixPlan
from cmae_scale.data.plan import (
    DataPlan,
    block_order,
    block_samples,
    epoch_pieces,
    plan_streams,
    run_pieces,
)

Sample = tuple[int, int]


def slow_epoch(plan: DataPlan, epoch: int) -> list[list[Sample]]:
    """All global batches of an epoch, from plain lists of (shard, sample)."""
    row: list[Sample] = []
    for piece in epoch_pieces(plan, epoch):
        row += [(piece.shard, piece.first + i) for i in range(piece.samples)]
    cut = len(row) // plan.streams
    steps = cut // plan.stream_rows
    runs = []
    for stream in range(plan.streams):
        run = row[stream * cut : stream * cut + steps * plan.stream_rows]
        blocks = [run[i : i + plan.window] for i in range(0, len(run), plan.window)]
        shuffled = []
        for number, block in enumerate(blocks):
            order = block_order(plan, epoch=epoch, stream=stream, block=number)
            assert sorted(order.tolist()) == list(range(len(block)))
            shuffled += [block[i] for i in order]
        runs.append(shuffled)
    return [
        [sample for run in runs for sample in run[t * plan.stream_rows : (t + 1) * plan.stream_rows]]
        for t in range(steps)
    ]


def planned_sample(plan: DataPlan, *, step: int, row: int) -> Sample:
    slot = plan.find_row(step=step, row=row)
    first = slot.block * plan.window
    reading = itertools.chain.from_iterable(
        [(piece.shard, piece.first + i) for i in range(piece.samples)]
        for piece in run_pieces(plan, epoch=slot.epoch, stream=slot.stream, first=first)
    )
    block = list(itertools.islice(reading, block_samples(plan, slot.block)))
    order = block_order(plan, epoch=slot.epoch, stream=slot.stream, block=slot.block)
    return block[order[slot.slot]]


@st.composite
def plans(draw: st.DrawFn) -> DataPlan:
    streams = draw(st.integers(1, 5))
    batch = streams * draw(st.integers(1, 4))
    shards = draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))
    shards[0] += max(0, batch - sum(shards))
    return DataPlan(tuple(shards), batch, streams, draw(st.integers(1, 12)), draw(st.integers(0, 2**70)))


@settings(max_examples=150, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 3))
def test_every_row_of_every_step_is_that_of_the_plain_list(plan: DataPlan, epoch: int) -> None:
    batches = slow_epoch(plan, epoch)
    assert len(batches) == plan.steps_per_epoch
    for step, batch in enumerate(batches):
        planned = [
            planned_sample(plan, step=epoch * plan.steps_per_epoch + step, row=row)
            for row in range(plan.global_batch)
        ]
        assert planned == batch


@settings(max_examples=200, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 5))
def test_an_epoch_uses_no_sample_twice_and_leaves_out_only_the_tail(plan: DataPlan, epoch: int) -> None:
    seen = [sample for batch in slow_epoch(plan, epoch) for sample in batch]
    assert len(seen) == len(set(seen)) == plan.samples_per_epoch == plan.total - plan.tail
    assert 0 <= plan.tail < plan.global_batch
    assert all(0 <= sample < plan.shard_samples[shard] for shard, sample in seen)


@settings(max_examples=100, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 3), stream=st.integers(0, 4), first=st.integers(0, 200))
def test_pieces_from_the_middle_of_a_run_are_the_end_of_its_pieces(
    plan: DataPlan, epoch: int, stream: int, first: int
) -> None:
    stream, first = stream % plan.streams, min(first, plan.run_samples)

    def samples(begin: int) -> list[Sample]:
        pieces = run_pieces(plan, epoch=epoch, stream=stream, first=begin)
        return [(piece.shard, piece.first + i) for piece in pieces for i in range(piece.samples)]

    assert samples(first) == samples(0)[first:]


@pytest.mark.parametrize(("ranks", "accumulation"), list(itertools.product([1, 2, 3, 4, 6], [1, 2, 4])))
def test_ranks_and_micro_batches_cut_the_global_batch_without_gap_or_overlap(
    ranks: int, accumulation: int
) -> None:
    plan = MixPlan((DataPlan((1000,), global_batch=48, streams=16, window=7, seed=0),), (0,) * 16, seed=0)
    parts = [
        plan.rows_of(rank=rank, ranks=ranks, micro=micro, accumulation=accumulation)
        for rank in range(ranks)
        for micro in range(accumulation)
    ]
    assert [row for part in parts for row in part] == list(range(48))
    assert len({len(part) for part in parts}) == 1


def test_epochs_and_seeds_have_different_orders() -> None:
    plan = DataPlan((50,) * 8, global_batch=20, streams=5, window=16, seed=3)
    other = DataPlan((50,) * 8, global_batch=20, streams=5, window=16, seed=4)
    orders = [slow_epoch(plan, 0), slow_epoch(plan, 1), slow_epoch(other, 0)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_tail_is_not_always_the_same_even_with_one_shard() -> None:
    plan = DataPlan((70,), global_batch=64, streams=64, window=16, seed=0)
    assert plan.tail == 6
    used = [{sample for batch in slow_epoch(plan, epoch) for sample in batch} for epoch in range(20)]
    assert len(set.union(*used)) == 70


def test_neighbours_on_disk_are_spread_over_the_window() -> None:
    plan = DataPlan((4096,), global_batch=64, streams=4, window=256, seed=1)
    first_step = sorted(planned_sample(plan, step=0, row=row)[1] for row in range(16))
    gaps = [(b - a) % 4096 for a, b in itertools.pairwise(first_step)]
    assert max(gaps) > 8, "16 samples out of a window of 256 should not stand side by side"


def test_the_order_is_pinned_so_that_a_change_of_numpy_or_of_ours_cannot_pass_silently() -> None:
    plan = DataPlan((5, 7, 4), global_batch=4, streams=2, window=4, seed=60)
    assert [planned_sample(plan, step=0, row=row) for row in range(4)] == [(0, 3), (0, 2), (1, 6), (2, 1)]


def test_more_batch_than_data_is_a_config_error_that_says_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"10 samples.*train_batch_size \(16\)"):
        DataPlan((4, 6), global_batch=16, streams=4, window=8, seed=0)


def test_streams_that_do_not_divide_the_batch_are_a_config_error_with_a_number_that_does() -> None:
    with pytest.raises(ConfigError, match=r"streams 7 does not divide train_batch_size 96: write 48"):
        DataPlan((1000,), global_batch=96, streams=plan_streams(96, 7), window=8, seed=0)


@pytest.mark.parametrize(
    ("batch", "streams"), [(1, 1), (64, 64), (96, 48), (4096, 64), (67, 1), (130, 26), (128, 64)]
)
def test_streams_default_to_the_largest_divisor_up_to_64(batch: int, streams: int) -> None:
    assert plan_streams(batch, None) == streams


def test_index_plan_tar_and_decode_do_not_load_torch(repository: Path) -> None:
    code = (
        "import sys; import cmae_scale.data.plan, cmae_scale.data.index, cmae_scale.data.tar, "
        "cmae_scale.data.decode; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0
