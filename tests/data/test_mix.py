"""Mixed data sets: exact shares, each set's own epochs, and nothing that depends on ranks or restarts."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.mix import MixPlan, deal_streams, plan_data
from cmae_scale.data.plan import block_order, run_pieces
from cmae_scale.data.shard_set import ShardSet, open_shards

Sample = tuple[int, int, int]


def plan_mix(
    shards: ShardSet, mix: tuple[float, ...] | None, *, batch: int = 24, **others: object
) -> MixPlan:
    data = DataConfig.model_validate({"shards": ("a",) * len(mix or "a"), "mix": mix, **others}, strict=False)
    return plan_data(shards, data, global_batch=batch, seed=3)


@pytest.fixture
def shards(make_folder) -> ShardSet:
    folders = tuple(str(make_folder(name, sizes)) for name, sizes in (("a", (30, 41)), ("b", (11, 6, 9))))
    return open_shards(folders, data=DataConfig(shards=folders, mix=(2.0, 1.0)))


def sample_at(plan: MixPlan, *, step: int, row: int) -> Sample:
    """(part, shard, sample) of a row, by listing its whole run."""
    owner, slot = plan.find_row(step=step, row=row)
    part = plan.parts[owner]
    run = [
        (owner, piece.shard, piece.first + i)
        for piece in run_pieces(part, epoch=slot.epoch, stream=slot.stream)
        for i in range(piece.samples)
    ]
    order = block_order(part, epoch=slot.epoch, stream=slot.stream, block=slot.block)
    return run[slot.block * part.window + order[slot.slot]]


@settings(max_examples=300, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), streams=st.integers(1, 256))
def test_every_share_is_exact_to_one_stream_and_evenly_spread(weights: list[float], streams: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    try:
        owners = deal_streams(weights, streams)
    except ConfigError:
        assert min(shares) * streams < len(weights)
        return
    for part, share in enumerate(shares):
        for dealt in range(1, streams + 1):
            assert abs(owners[:dealt].count(part) - share * dealt) < len(weights)
        assert owners.count(part) >= 1


def test_a_batch_holds_the_share_of_each_set_in_every_step(shards: ShardSet) -> None:
    plan = plan_mix(shards, (2.0, 1.0), streams=12)
    assert [part.global_batch for part in plan.parts] == [16, 8]
    for step in range(2 * plan.steps_per_epoch):
        owners = [plan.find_row(step=step, row=row)[0] for row in range(24)]
        assert owners.count(0) == 16
        for rank in range(4):
            own = plan.rows_of(rank=rank, ranks=4)
            assert sorted(owners[row] for row in own) == [0, 0, 0, 0, 1, 1], "every rank has its share"


def test_each_set_goes_through_its_own_epochs_without_loss_or_repeat(shards: ShardSet) -> None:
    plan = plan_mix(shards, (2.0, 1.0), streams=6, shuffle_window=5)
    for owner, part in enumerate(plan.parts):
        seen: list[Sample] = []
        for step in range(3 * part.steps_per_epoch):
            found = [sample_at(plan, step=step, row=row) for row in range(24)]
            seen += [sample for sample in found if sample[0] == owner]
        size = part.samples_per_epoch
        epochs = [seen[i * size : (i + 1) * size] for i in range(3)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert part.total - size < part.global_batch


def test_one_set_in_a_mix_is_the_plan_without_a_mix(make_folder) -> None:
    folder = str(make_folder("a", (30, 41)))
    shards = open_shards((folder,), data=DataConfig(shards=(folder,), mix=(0.3,)))
    mixed, plain = plan_mix(shards, (0.3,)), plan_mix(shards, None)
    assert mixed == plain
    assert plain.fingerprint == plain.parts[0].fingerprint


def test_sets_of_equal_shards_are_not_shuffled_equally(make_folder) -> None:
    folders = tuple(str(make_folder(name, (50,))) for name in "ab")
    shards = open_shards(folders, data=DataConfig(shards=folders, mix=(1.0, 1.0)))
    plan = plan_mix(shards, (1.0, 1.0))
    rows: dict[int, list[int]] = {0: [], 1: []}
    for row in range(24):
        part, _, number = sample_at(plan, step=0, row=row)
        rows[part].append(number)
    assert rows[0] != rows[1]


def test_fingerprints_tell_mixes_apart(shards: ShardSet) -> None:
    plans = [plan_mix(shards, mix, streams=12) for mix in ((2.0, 1.0), (1.0, 1.0), (1.0, 2.0))]
    plans.append(plan_mix(shards, None, streams=12))
    for one, other in itertools.combinations(plans, 2):
        assert one.fingerprint != other.fingerprint


def test_a_plan_is_described_by_its_counts_and_the_name_of_its_order(shards: ShardSet) -> None:
    plan = plan_mix(shards, (2.0, 1.0), streams=12, shuffle_window=5)
    assert plan.describe() == {
        "images": shards.total,
        "shards": len(shards.shards),
        "streams": 12,
        "shuffle_window": 5,
        "order": plan.fingerprint,
    }


def test_too_small_a_share_is_refused_with_a_remedy(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"entry 2 has a share of 0\.99%.*raise cmae\.data\.streams"):
        plan_mix(shards, (100.0, 1.0))


def test_a_mix_has_a_number_for_each_entry() -> None:
    with pytest.raises(ValueError, match="one number for each entry of shards: 2, not 1"):
        DataConfig(shards=("a", "b"), mix=(1.0,))
