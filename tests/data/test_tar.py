"""The strict reader: agrees with stock webdataset on whole shards, and notices every damage to one."""

import contextlib
import hashlib
import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cmae_scale.core.errors import DataError
from cmae_scale.data.index import ShardInfo
from cmae_scale.data.tar import RawSample, list_members, read_samples

SAMPLES = [
    RawSample("000000000", b"\xff\xd8\xff first", 3),
    RawSample("000000001", bytes(range(256)) * 5, 0),
    RawSample("000000002", b"x" * 512, None),
    RawSample("000000003", b"y" * 1023, 12),
]
ENDINGS = ["jpg", "png", "webp", "JPEG"]


def members(samples: list[RawSample]) -> list[tuple[str, bytes]]:
    parts = []
    for number, sample in enumerate(samples):
        parts.append((f"{sample.key}.{ENDINGS[number % 4]}", sample.image))
        if sample.label is not None:
            parts.append((f"{sample.key}.cls", str(sample.label).encode()))
    return parts


def tar_bytes(parts: list[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in parts:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def write_shard(path: Path, content: bytes, *, samples: int) -> ShardInfo:
    path.write_bytes(content)
    return ShardInfo(path.name, samples, len(content), hashlib.sha256(content).hexdigest())


def read_all(path: Path, info: ShardInfo) -> list[RawSample]:
    return list(read_samples(path, first=0, count=info.samples, expected=info))


@pytest.fixture
def whole() -> bytes:
    return tar_bytes(members(SAMPLES))


@pytest.mark.parametrize(("first", "count"), [(f, c) for f in range(4) for c in range(1, 5 - f)])
def test_every_range_of_samples(tmp_path: Path, whole: bytes, first: int, count: int) -> None:
    info = write_shard(tmp_path / "a.tar", whole, samples=4)
    read = list(read_samples(tmp_path / "a.tar", first=first, count=count, expected=info))
    assert read == SAMPLES[first : first + count]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_folders_as_stock_webdataset_reads_them(tmp_path: Path, form: int) -> None:
    folder = "long" * 20 + "/"
    names = ["a.jpg", f"{folder}b.png", f"{folder}{'c' * 95}.jpg", "d/e.webp"]
    if form != tarfile.USTAR_FORMAT:
        names += ["f" * 200 + ".jpg", "größe.png"]
    parts = []
    for name in names:
        parts += [(name, name.encode()), (name.rsplit(".", 1)[0] + ".cls", b"7"), ("notes", b"no ending")]
    info = write_shard(tmp_path / "a.tar", tar_bytes(parts, form=form), samples=len(names))
    stock = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    expected = [
        (s["__key__"], next(s[e] for e in ("jpg", "png", "webp") if e in s), int(s["cls"])) for s in stock
    ]
    assert [tuple(sample) for sample in read_all(tmp_path / "a.tar", info)] == expected
    last = list(read_samples(tmp_path / "a.tar", first=len(names) - 1, count=1, expected=info))
    assert [tuple(sample) for sample in last] == expected[-1:]


def test_what_the_stock_writer_makes(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"k{number}", "jpg": b"j" * number, "cls": number, "json": {"a": 1}, "txt": "b"}
            )
    info = write_shard(path, path.read_bytes(), samples=5)
    assert read_all(path, info) == [RawSample(f"k{n}", b"j" * n, n) for n in range(5)]


def test_a_tar_cut_at_any_block_is_noticed(tmp_path: Path, whole: bytes) -> None:
    """Both with an index that knows the whole size, and with one that was made from the cut file."""
    path = tmp_path / "a.tar"
    info = write_shard(path, whole, samples=4)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # all after that is padding
    for cut in range(0, len(whole), 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"has {cut} bytes where the index says {len(whole)}"):
            read_all(path, info)
        if 0 < cut < end:
            fitting = ShardInfo(info.name, 4, cut, info.sha256)
            with pytest.raises(DataError, match="is damaged"):
                read_all(path, fitting)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_tar_cut_at_any_byte_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = tar_bytes(members(SAMPLES))
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    cut = data.draw(st.integers(1, end - 1))
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    info = write_shard(path, whole[:cut], samples=4)
    with pytest.raises(DataError, match="is damaged"):
        read_all(path, info)


def test_any_flipped_bit_of_any_header_is_noticed(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a.tar"
    headers = []
    position = 0
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar]
        position = headers[-1] + 1024  # where the archive ends: two blocks of zeros
    places = [start + offset for start in headers[:1] for offset in range(512)]
    places += [headers[-1] + offset for offset in range(0, 512, 7)]
    places += list(range(position, position + 1024, 9))
    for number, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (number % 8)
        info = write_shard(path, bytes(damaged), samples=4)
        with pytest.raises(DataError, match="is damaged"):
            read_all(path, info)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"0"), ("b.cls", b"1")], "more samples than"),
        ([("a.cls", b"1"), ("b.jpg", b"2")], "sample 'a' has no image"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "sample 'a' has two images"),
        ([("a.jpg", b"1"), ("a.cls", b"one")], "label of sample 'a' is b'one'"),
        ([("a.jpg", b"1"), ("a.cls", b"-1")], "label of sample 'a' is b'-1'"),
        ([("a.jpg", b"1"), ("a.cls", b"")], "label of sample 'a' is b''"),
        ([("a.v1.jpg", b"1"), ("a.v2.jpg", b"2")], "sample 'a' has no image"),
        ([("a.jpg", b"1")], "ends 1 samples early"),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")], "more samples than the index says"),
        ([("a.pkl", b"1"), ("b.pyd", b"2")], "sample 'a' has no image"),
    ],
)
def test_samples_that_do_not_add_up_are_refused(
    tmp_path: Path, parts: list[tuple[str, bytes]], message: str
) -> None:
    info = write_shard(tmp_path / "a.tar", tar_bytes(parts), samples=2)
    with pytest.raises(DataError, match=message) as error:
        read_all(tmp_path / "a.tar", info)
    assert "a.tar (2 samples) is damaged" in str(error.value)
    assert "make_shards" in str(error.value)


@pytest.mark.parametrize(
    "content", [bytes(10240), b"<html>not found</html>" * 400, b"", b"\x1f\x8b" + bytes(2046)]
)
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    info = write_shard(tmp_path / "a.tar", content, samples=1)
    with pytest.raises(DataError, match="is damaged"):
        read_all(tmp_path / "a.tar", info)


def test_two_tars_glued_together_are_refused(tmp_path: Path, whole: bytes) -> None:
    info = write_shard(tmp_path / "a.tar", whole + whole, samples=4)
    with pytest.raises(DataError, match="end-of-archive mark stands in its middle"):
        read_all(tmp_path / "a.tar", info)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        header = tarfile.TarInfo("a.jpg")
        header.type, header.linkname = kind, "/etc/passwd"
        tar.addfile(header)
    info = write_shard(tmp_path / "a.tar", file.getvalue(), samples=1)
    with pytest.raises(DataError, match="a link or a device"):
        read_all(tmp_path / "a.tar", info)


def test_a_forged_size_does_not_fill_the_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.size = 8**11 - 1
    content = header.tobuf(tarfile.USTAR_FORMAT) + bytes(9728)
    info = write_shard(tmp_path / "a.tar", content, samples=1)
    with pytest.raises(DataError, match="above the limit"):
        read_all(tmp_path / "a.tar", info)


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=4096), at=st.integers(0, 9000))
def test_noise_anywhere_gives_samples_or_a_data_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    content = bytearray(tar_bytes(members(SAMPLES)))
    content[at : at + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / "noise.tar"
    info = write_shard(path, bytes(content), samples=4)
    with contextlib.suppress(DataError):
        assert [sample.key for sample in read_all(path, info)] == [sample.key for sample in SAMPLES]


def test_an_abandoned_reader_closes_its_file(tmp_path: Path, whole: bytes) -> None:
    info = write_shard(tmp_path / "a.tar", whole, samples=4)
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir()))
    for _ in range(20):
        samples = read_samples(tmp_path / "a.tar", first=1, count=2, expected=info)
        next(samples)
        samples.close()
    assert len(list(handles.iterdir())) == before


def test_members_are_listed_without_an_index_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a/1.tar", "no_ending", "2.JPEG"):
            header = tarfile.TarInfo(name)
            header.size = 700
            tar.addfile(header, io.BytesIO(name[:1].encode() * 700))
    with path.open("rb") as file:
        members = list(list_members(file, name="some.tar"))
        assert [(member.key, member.ending, member.size) for member in members] == [
            ("a/1", "tar", 700),
            ("2", "jpeg", 700),
        ]
        file.seek(members[1].data)
        assert file.read(700) == b"2" * 700
    path.write_bytes(path.read_bytes()[:4096])
    with path.open("rb") as file, pytest.raises(DataError, match=r"some\.tar is damaged: it ends at byte"):
        list(list_members(file, name="some.tar"))


@pytest.mark.parametrize("ending", ["pkl", "pyd", "pickle", "pth", "pkl.gz", "npy"])
def test_nothing_of_a_hostile_tar_is_run_or_written(tmp_path: Path, ending: str) -> None:
    """A payload beside an image is stepped over; a key that is a path stays a key."""
    trap = tmp_path / "trap"
    payload = f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode()
    parts = [("../../etc/a.jpg", b"image"), (f"../../etc/a.{ending}", payload), ("/b.jpg", b"other")]
    info = write_shard(tmp_path / "a.tar", tar_bytes(parts), samples=2)
    assert read_all(tmp_path / "a.tar", info) == [
        RawSample("../../etc/a", b"image", None),
        RawSample("/b", b"other", None),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_usual_image_is_taken_whatever_other_image_is_beside_it(tmp_path: Path) -> None:
    parts = [("a.bmp", b"preview"), ("a.jpg", b"image"), ("a.tif", b"depth"), ("b.tif", b"alone")]
    info = write_shard(tmp_path / "a.tar", tar_bytes(parts), samples=2)
    assert [sample.image for sample in read_all(tmp_path / "a.tar", info)] == [b"image", b"alone"]
