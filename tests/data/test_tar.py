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
from cmae_scale.data.tar import RawSample, find_offsets, list_members, read_samples, split_members

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
    locations = [start + offset for start in headers[:1] for offset in range(512)]
    locations += [headers[-1] + offset for offset in range(0, 512, 7)]
    locations += list(range(position, position + 1024, 9))
    for number, location in enumerate(locations):
        damaged = bytearray(whole)
        damaged[location] ^= 1 << (number % 8)
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
        ([("a.jpg", b"1"), ("a.cls", b"-2")], "label of sample 'a' is b'-2'"),
        ([("a.jpg", b"1"), ("a.cls", b"+1")], r"label of sample 'a' is b'\+1'"),
        ([("a.jpg", b"1"), ("a.cls", b"1_0")], "label of sample 'a' is b'1_0'"),
        ([("a.jpg", b"1"), ("a.cls", str(2**63).encode())], "label of sample 'a' is b'9223372036854775808'"),
        ([("a.jpg", b"1"), ("a.cls", b"9" * 5000)], "label of sample 'a' is b'99999999999999999999', not"),
        ([("a.v1.jpg", b"1"), ("a.v2.jpg", b"2")], "sample 'a' has two images"),
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
    ("content", "said"),
    [
        (bytes(10240), "is damaged"),
        (b"", "is damaged"),
        (b"<html>not found</html>" * 400, "is no tar archive but a web page"),
        (b"\x1f\x8b" + bytes(2046), r"is no tar archive but compressed with gzip: .*gunzip"),
        (b"PK\x03\x04" + bytes(999), "is no tar archive but a zip archive"),
        (b"\xff\xd8\xff" + bytes(999), "is no tar archive but a JPEG image"),
    ],
)
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    info = write_shard(tmp_path / "a.tar", content, samples=1)
    with pytest.raises(DataError, match=said):
        read_all(tmp_path / "a.tar", info)
    if "no tar" in said:
        with (tmp_path / "a.tar").open("rb") as file, pytest.raises(DataError, match=said):
            find_offsets(file, name="a.tar")


SIZE = slice(124, 136)


def with_size(content: bytes, size: bytes, *, member: int) -> bytes:
    """The archive with another size field in a header, under a right checksum."""
    damaged = bytearray(content)
    begin = [
        location
        for location in range(0, len(content), 512)
        if content[location + 257 : location + 262] == b"ustar"
    ]
    header = memoryview(damaged)[begin[member] :][:512]
    header[SIZE] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(damaged)


SIZES = [
    *(b"-0000000001\0", b"-0000001000\0", b"-1\0", b"+0000000014\0", b"0o000000014\0", b"0000_000014\0"),
    *(
        b"0x00000014 \0",
        b"00000000019\0",
        b"\x80" + bytes(11),
        b"\xff" * 12,
        bytes(12),
        b" " * 12,
        b"12\00012\0",
    ),
]


@pytest.mark.parametrize("member", [0, 2, 5])
@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_a_size_that_is_no_plain_octal_number_is_damage(
    tmp_path: Path, whole: bytes, size: bytes, member: int
) -> None:
    content = with_size(whole, size.ljust(12, b"\0")[:12], member=member)
    info = write_shard(tmp_path / "a.tar", content, samples=4)
    with pytest.raises(DataError, match=r"is damaged: the header at byte .* gives no size"):
        read_all(tmp_path / "a.tar", info)
    with (tmp_path / "a.tar").open("rb") as file, pytest.raises(DataError, match="gives no size"):
        find_offsets(file, name="a.tar")


@settings(max_examples=300, deadline=None)
@given(size=st.binary(min_size=12, max_size=12) | st.text("0123456789 -+_ox\0", min_size=12, max_size=12))
def test_whatever_a_size_field_holds_the_archive_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, size: bytes | str
) -> None:
    path = tmp_path_factory.getbasetemp() / "size.tar"
    field = size.encode() if isinstance(size, str) else size
    info = write_shard(path, with_size(tar_bytes(members(SAMPLES)), field, member=1), samples=4)
    with contextlib.suppress(DataError):
        read_all(path, info)


@pytest.mark.parametrize(
    "length", ["9" * 5000, "1000000", "-19", "+19", "1_9", "019", "0", "", " 19", "\u0661\u0669"]
)
def test_a_pax_record_of_an_absurd_length_is_damage(tmp_path: Path, length: str) -> None:
    record = f"{length} path=other.jpg\n".encode()
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    blocks = header.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)
    info = write_shard(tmp_path / "a.tar", blocks + tar_bytes([("a.jpg", b"1")]), samples=1)
    with pytest.raises(DataError, match="is damaged: it holds a malformed pax record"):
        read_all(tmp_path / "a.tar", info)


@pytest.mark.parametrize(("text", "label"), [(b"", None), (b"-1", None), (b" -1\n", None), (b"7\n", 7)])
def test_an_empty_label_and_minus_one_are_none(tmp_path: Path, text: bytes, label: int | None) -> None:
    info = write_shard(tmp_path / "a.tar", tar_bytes([("a.jpg", b"1"), ("a.cls", text)]), samples=1)
    assert read_all(tmp_path / "a.tar", info) == [RawSample("a", b"1", label)]


DOTTED = [
    ("cam.008.jpg", b"8"),
    ("cam.008.cls", b"1"),
    ("cam.009.jpg", b"9"),
    ("cam.009.cls", b"2"),
    ("b.jpg", b"b"),
]


def test_names_with_a_dot_in_each_are_read_by_their_stems(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = write_shard(path, tar_bytes(DOTTED), samples=3)
    expected = [RawSample("cam.008", b"8", 1), RawSample("cam.009", b"9", 2), RawSample("b", b"b", None)]
    with path.open("rb") as file:
        offsets = find_offsets(file, name="a", by_stem=True)
    for first in range(3):
        for known in (None, offsets):
            read = read_samples(
                path, first=first, count=3 - first, expected=info, offsets=known, by_stem=True
            )
            assert list(read) == expected[first:]


@pytest.mark.parametrize(
    ("names", "samples"),
    [
        (["a.1.jpg", "a.2.jpg", "b.1.jpg"], {"a.1": 1, "a.2": 1, "b.1": 1}),
        (["a.jpg", "a.seg.png", "a.cls"], {"a": 3}),
        (["a.rgb.jpg", "a.cls"], {"a": 2}),
        (["2019.01.05.jpg", "2019.01.05.cls", "2019.01.06.jpg"], {"2019.01.05": 2, "2019.01.06": 1}),
        (["v1.0/a.jpg", "v1.0/a.cls"], {"v1.0/a": 2}),
    ],
)
def test_dots_mean_parts_of_a_sample_only_beside_a_name_without_them(
    tmp_path: Path, names: list[str], samples: dict[str, int]
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([(name, b"1") for name in names]))
    with (tmp_path / "a.tar").open("rb") as file:
        found = {key: len(own) for key, own in split_members(list_members(file, name="a"))}
    assert found == samples


def test_the_image_of_a_sample_may_have_a_name_of_its_own_where_no_other_is_there(tmp_path: Path) -> None:
    parts = [("a.depth.png", b"depth"), ("a.jpg", b"image"), ("b.cls", b"1"), ("b.rgb.jpg", b"other")]
    info = write_shard(tmp_path / "a.tar", tar_bytes(parts), samples=2)
    assert [sample.image for sample in read_all(tmp_path / "a.tar", info)] == [b"image", b"other"]


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
            ("no_ending", "", 700),
            ("2", "jpeg", 700),
        ]
        file.seek(members[2].data)
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
