"""The threaded stream: gives what the plan says, whoever reads, and ends cleanly whatever happens."""

import hashlib
import io
import itertools
import signal
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.core.errors import DataError
from cmae_scale.data.blocks import BlockReader, Part
from cmae_scale.data.crops import decode_crops
from cmae_scale.data.decode import CROP_DRAWS
from cmae_scale.data.decoding import BadSamples, BatchMemory
from cmae_scale.data.index import ShardInfo
from cmae_scale.data.mix import MixPlan, plan_data
from cmae_scale.data.plan import Purpose, block_order, draw_uniforms, run_pieces
from cmae_scale.data.shard_set import Shard, ShardSet
from cmae_scale.data.storage import LOCAL
from cmae_scale.data.stream import BatchStream, CropBatch, DecodedRow, open_batches
from cmae_scale.data.tar import RawSample

VIEWS = ViewsConfig(img_px=16, master_px=20, shift_px=4)
SHARDS = (7, 13, 1, 20, 9)


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, sizes: tuple[int, ...], *, bad: frozenset[int] = frozenset()) -> ShardSet:
    """Shards of small noise images; those numbered in `bad` cannot be decoded."""
    numbers = itertools.count()
    infos = []
    for shard, size in enumerate(sizes):
        path = folder / f"shard-{shard:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in itertools.islice(numbers, size):
                image = b"\x89PNG\r\n\x1a\n broken" if number in bad else picture(number)
                for name, data in (
                    (f"{number:09d}.png", image),
                    (f"{number:09d}.cls", str(number % 10).encode()),
                ):
                    header = tarfile.TarInfo(name)
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
        content = path.read_bytes()
        infos.append(ShardInfo(path.name, size, len(content), hashlib.sha256(content).hexdigest()))
    classes = tuple(str(digit) for digit in range(10))
    shards = tuple(Shard(str(folder), info.name, info, LOCAL) for info in infos)
    return ShardSet(shards, classes, parts=(len(shards),))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("shards"), SHARDS)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("data ")]


def make_plan(shards: ShardSet, *, batch: int = 12, streams: int = 6, window: int = 4) -> MixPlan:
    data = DataConfig(shards="unused", streams=streams, shuffle_window=window)
    return plan_data(shards, data, global_batch=batch, seed=5)


def start(
    shards: ShardSet,
    plan: MixPlan,
    *,
    rank: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
    first_step: int = 0,
    end_step: int = 9,
    workers: int = 2,
    prefetch: int = 2,
    views: ViewsConfig = VIEWS,
    bad: BadSamples | None = None,
) -> BatchStream:
    return open_batches(
        shards,
        plan,
        views=views,
        data=DataConfig(shards="unused", workers=workers, prefetch=prefetch),
        rank=rank,
        ranks=ranks,
        accumulation=accumulation,
        first_step=first_step,
        end_step=end_step,
        pin=False,
        bad=bad or BadSamples(1.0),
    )


def read_all(stream: BatchStream) -> list[CropBatch]:
    with stream:
        return list(stream)


def assert_same(batches: list[CropBatch], expected: list[CropBatch]) -> None:
    assert [(b.step, b.micro, b.keys) for b in batches] == [(b.step, b.micro, b.keys) for b in expected]
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)


def slow_sample(shards: ShardSet, plan: MixPlan, *, step: int, row: int) -> tuple[int, str, RawSample]:
    """The sample of a row, found by reading its whole run."""
    _, slot = plan.find_row(step=step, row=row)
    part = plan.parts[0]
    starts = [0, *itertools.accumulate(part.shard_samples)]
    run = []
    for piece in run_pieces(part, epoch=slot.epoch, stream=slot.stream):
        shard = shards.shards[piece.shard]
        samples = list(shard.read(0, shard.info.samples))
        for number in range(piece.first, piece.first + piece.samples):
            run.append((starts[piece.shard] + number, f"{shard.name}/{samples[number].key}", samples[number]))
    order = block_order(part, epoch=slot.epoch, stream=slot.stream, block=slot.block)
    return run[slot.block * part.window + order[slot.slot]]


@pytest.mark.parametrize("views", [VIEWS, VIEWS.model_copy(update={"target_crop": "random"})])
def test_each_row_holds_the_planned_sample_with_its_own_crops(shards: ShardSet, views: ViewsConfig) -> None:
    plan = make_plan(shards)
    crops = 2 if views.target_crop == "random" else 1
    for batch in read_all(start(shards, plan, views=views)):
        assert batch.images.shape == (12, crops, 3, 20, 20)
        for row in range(12):
            number, key, raw = slow_sample(shards, plan, step=batch.step, row=row)
            epoch = batch.step // plan.steps_per_epoch
            draws = [
                draw_uniforms(5, Purpose.CROP, slot=(epoch, number, crop), count=CROP_DRAWS).tolist()
                for crop in range(crops)
            ]
            expected = decode_crops(
                raw.image, side=20, scale=views.crop_scale, ratio=views.crop_ratio, max_mpx=1.0, draws=draws
            )
            np.testing.assert_array_equal(batch.images[row], expected.transpose(0, 3, 1, 2))
            assert (batch.keys[row], int(batch.labels[row])) == (key, raw.label)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("first_step", range(9))
def test_beginning_at_any_step_equals_straight_through(
    shards: ShardSet, workers: int, first_step: int
) -> None:
    plan = make_plan(shards, window=7)
    assert plan.steps_per_epoch == 4, "nine steps are to cross two epochs"
    straight = read_all(start(shards, plan, workers=2))
    resumed = read_all(start(shards, plan, workers=workers, first_step=first_step))
    assert_same(resumed, straight[first_step:])


@pytest.mark.parametrize(
    ("ranks", "accumulation"), [(1, 2), (1, 4), (2, 1), (2, 3), (3, 1), (4, 1), (6, 2), (12, 1)]
)
def test_ranks_and_accumulation_share_out_the_same_global_batches(
    shards: ShardSet, ranks: int, accumulation: int
) -> None:
    plan = make_plan(shards)
    whole = read_all(start(shards, plan))
    parts = [
        read_all(start(shards, plan, rank=rank, ranks=ranks, accumulation=accumulation, workers=1 + rank % 3))
        for rank in range(ranks)
    ]
    for step, batch in enumerate(whole):
        own = [part for rank in parts for part in rank[step * accumulation : (step + 1) * accumulation]]
        assert [(part.step, part.micro) for part in own] == [
            (step, micro) for _ in range(ranks) for micro in range(accumulation)
        ]
        assert torch.equal(torch.cat([part.images for part in own]), batch.images)
        assert torch.cat([part.labels for part in own]).tolist() == batch.labels.tolist()
        assert tuple(key for part in own for key in part.keys) == batch.keys


def test_an_epoch_holds_no_image_twice_and_the_next_is_cropped_anew(shards: ShardSet) -> None:
    plan = make_plan(shards)
    batches = read_all(start(shards, plan, end_step=2 * plan.steps_per_epoch))
    first, second = batches[: plan.steps_per_epoch], batches[plan.steps_per_epoch :]
    images = [
        {key: batch.images[row] for batch in epoch for row, key in enumerate(batch.keys)}
        for epoch in (first, second)
    ]
    assert len(images[0]) == len(images[1]) == plan.parts[0].samples_per_epoch
    both = images[0].keys() & images[1].keys()
    assert len(both) > plan.total // 2
    assert not any(torch.equal(images[0][key], images[1][key]) for key in both)


def test_bad_images_are_counted_and_replaced_the_same_way_for_any_world(tmp_path: Path) -> None:
    bad_ones = frozenset((3, 4, 17, 30, 41))
    shards = write_shards(tmp_path, SHARDS, bad=bad_ones)
    plan = make_plan(shards, window=8)
    count = BadSamples(1.0)
    whole = read_all(start(shards, plan, end_step=4, workers=3, bad=count))
    seen = [int(key[-9:]) for batch in whole for key in batch.keys]
    assert not bad_ones & set(seen)
    planned = {slow_sample(shards, plan, step=s, row=r)[0] for s in range(4) for r in range(12)}
    assert count.count == len(planned & bad_ones) == len(count.reasons)
    halves = [read_all(start(shards, plan, end_step=4, rank=rank, ranks=2, workers=1)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([half[step].images for half in halves]), batch.images)
        assert halves[0][step].keys + halves[1][step].keys == batch.keys


def test_a_stand_in_is_of_the_same_block_and_of_another_step(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, (64,), bad=frozenset(range(0, 64, 9)))
    plan = make_plan(shards, batch=8, streams=2, window=16)
    for batch in read_all(start(shards, plan, end_step=plan.steps_per_epoch)):
        assert len(set(batch.keys)) == 8, "the same image twice in a global batch is a false negative"
        for row, key in enumerate(batch.keys):
            number, planned, _ = slow_sample(shards, plan, step=batch.step, row=row)
            assert (key == planned) == (number % 9 != 0)


def test_a_block_without_any_readable_image_stops_with_an_error(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, (24,), bad=frozenset(range(24)))
    with (
        start(shards, make_plan(shards)) as stream,
        pytest.raises(DataError, match="no image of a whole shuffle"),
    ):
        next(stream)


def test_damage_surfaces_at_the_batch_that_needs_it_and_not_before(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, (30, 30))
    plan = make_plan(shards, batch=2, streams=1, window=1)
    second = list(run_pieces(plan.parts[0], epoch=0, stream=0))[1].shard
    path = Path(shards.shards[second].location)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    healthy: list[CropBatch] = []
    with start(shards, plan, end_step=30) as stream, pytest.raises(DataError, match="fails its checksum"):
        healthy.extend(stream)
    assert len(healthy) == next(run_pieces(plan.parts[0], epoch=0, stream=0)).samples // 2


def test_an_error_of_ours_in_a_thread_reaches_the_consumer_as_it_is(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in a decoder")

    monkeypatch.setattr("cmae_scale.data.decoding.decode_crops", fail)
    with start(shards, make_plan(shards)) as stream:
        with pytest.raises(ZeroDivisionError, match="in a decoder"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


@pytest.mark.parametrize("death", [SystemExit, MemoryError, KeyboardInterrupt])
def test_a_dying_decoding_thread_does_not_hang_the_consumer(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, death: type[BaseException]
) -> None:
    def die(*_: object, **__: object) -> None:
        raise death

    monkeypatch.setattr("cmae_scale.data.decoding.decode_crops", die)
    with start(shards, make_plan(shards)) as stream, pytest.raises(death):
        next(stream)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_in_the_middle_ends_all_threads_at_once(shards: ShardSet, taken: int) -> None:
    stream = start(shards, make_plan(shards), end_step=100_000, workers=3)
    for _ in range(taken):
        next(stream)
    stream.close()
    stream.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("data ")]
    with pytest.raises(StopIteration):
        next(stream)


def test_an_interrupt_while_waiting_closes_the_stream(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    main = threading.get_ident()

    def decode(*_: object, **__: object) -> DecodedRow:
        release.wait()
        return DecodedRow(0, "")

    def interrupt() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        release.set()

    monkeypatch.setattr("cmae_scale.data.stream.decode_row", decode)
    timer = threading.Timer(0.1, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt), start(shards, make_plan(shards), end_step=100_000) as stream:
        next(stream)
    timer.join()


@pytest.mark.parametrize(("accumulation", "prefetch"), [(1, 1), (1, 3), (4, 1), (4, 2)])
def test_a_whole_step_is_made_ahead_and_no_more_batches_than_asked(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, accumulation: int, prefetch: int
) -> None:
    made = 0
    take = BatchMemory.take

    def count(memory: BatchMemory, shape: Sequence[int]) -> torch.Tensor:
        nonlocal made
        made += 1
        return take(memory, shape)

    monkeypatch.setattr(BatchMemory, "take", count)
    plan = make_plan(shards)
    with start(shards, plan, end_step=100, prefetch=prefetch, accumulation=accumulation) as stream:
        next(stream)
        while made < accumulation + prefetch:
            time.sleep(0.01)
        time.sleep(0.1)  # one more would come in less
        assert made == accumulation + prefetch


@pytest.mark.parametrize("accumulation", [1, 4, 8, 64])
@pytest.mark.parametrize("prefetch", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_step_that_takes_longer_than_decoding_leaves_the_next_no_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, prefetch: int, workers: int
) -> None:
    """Counted in images and not in seconds: a step is computed until the next one's images are all decoded.

    It goes on forever if the loader stops before, which here is told after some seconds without an image.
    """
    decoded = threading.Semaphore(0)

    def decode(*_: object, **__: object) -> DecodedRow:
        decoded.release()
        return DecodedRow(0, "")

    monkeypatch.setattr("cmae_scale.data.stream.decode_row", decode)
    shards, images = write_shards(tmp_path, (64, 64)), 2 * accumulation
    plan = make_plan(shards, batch=images, streams=2)
    settings = {"prefetch": prefetch, "workers": workers, "accumulation": accumulation}
    with start(shards, plan, end_step=5, **settings) as stream:
        decoded_steps = 0
        for step in range(4):
            parts = list(itertools.islice(stream, accumulation))
            assert [(part.step, part.micro) for part in parts] == [(step, m) for m in range(accumulation)]
            while decoded_steps < step + 2:  # this one and the next
                arrived = (decoded.acquire(timeout=10) for _ in range(images))
                ready = sum(1 for _ in itertools.takewhile(bool, arrived))
                assert ready == images, f"of step {decoded_steps} only {ready} of {images} images are ready"
                decoded_steps += 1


def test_batches_own_their_memory(shards: ShardSet) -> None:
    with start(shards, make_plan(shards), end_step=20, prefetch=1) as stream:
        kept = next(stream)
        before = kept.images.clone()
        for _ in stream:
            pass
    assert torch.equal(kept.images, before)


def test_at_most_two_windows_of_a_stream_are_in_memory(shards: ShardSet) -> None:
    plan = make_plan(shards, batch=2, streams=2, window=6).parts[0]
    reader = BlockReader(Part(shards.shards, plan, 0), start=plan.find_row(step=0, row=0))
    for step in range(2 * plan.steps_per_epoch):
        block = reader.reach(plan.find_row(step=step, row=0))
        reader.read_ahead(plan.stream_rows)
        ahead = reader._ahead
        assert len(block.samples) <= plan.window
        assert len(ahead.samples) <= plan.window
        done = step % plan.steps_per_epoch % plan.window + 1
        assert len(ahead.samples) <= done, "the next window fills as the current one is used, not at once"


def test_no_steps_give_no_batches(shards: ShardSet) -> None:
    assert read_all(start(shards, make_plan(shards), first_step=4, end_step=4)) == []
