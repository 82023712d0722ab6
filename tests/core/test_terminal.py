"""Nothing of a file's reaches a terminal as a command to it."""

import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmae_scale.core.cli import Parser, run_command
from cmae_scale.core.errors import DataError
from cmae_scale.core.terminal import Progress, make_safe, make_safe_name, tell

REPOSITORY = Path(__file__).resolve().parents[2]


@given(st.text())
def test_no_control_character_comes_through_and_all_others_do(text: str) -> None:
    safe = make_safe(text)
    assert not [each for each in safe if unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t"]
    assert make_safe(safe) == safe
    name = make_safe_name(text, longest=20)
    assert len(name) <= 20
    assert len(name.splitlines()) <= 1


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\rb", "\x9b2J", "bell\a", "\u202egnp.exe", "\ud800", "\0"])
def test_control_characters_are_spelt_out(text: str) -> None:
    assert make_safe(text).isprintable()
    assert make_safe(text) != text


@pytest.mark.parametrize("text", ["Straße", "猫 und Katze", "قطة", "naïve\n\tline"])
def test_other_scripts_are_left_alone(text: str) -> None:
    assert make_safe(text) == text


def test_a_terminal_of_few_characters_gets_the_others_spelt_out() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tell("猫", to=stream)
    stream.seek(0)
    assert stream.read() == "\\u732b\n"


def test_arguments_that_libraries_record_are_masked_and_read_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["pretrain.py", "--set", "cmae.data.shards=https://u:TOKEN@h/a?sig=TOKEN"]
    )
    read: list[str] = []
    assert run_command(lambda argv: read.extend(argv or ())) == 0
    assert read[1] == "cmae.data.shards=https://u:TOKEN@h/a?sig=TOKEN"
    assert sys.argv == ["pretrain.py", "--set", "cmae.data.shards=https://*****@h/a?sig=*****"]


def test_errors_and_progress_go_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: object) -> None:
        raise DataError("https://user:TOKEN@host/\x1b[2Ja?sig=TOKEN is missing")

    assert run_command(fail, []) == 2
    progress = Progress(3, stream=sys.stdout)
    progress.report(1, {"class\x1b]0;x": "https://h/?a=TOKEN"})
    progress.say("\x1b[1mTOKEN@ https://TOKEN@h")
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    assert (told.out + told.err).count("TOKEN") == 1  # of no address


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (
            ZeroDivisionError("of https://u:TOKEN@h/a?sig=TOKEN\x1b[2J"),
            1,
            "ZeroDivisionError: of https://*****@h",
        ),
        (
            IsADirectoryError(21, "Is a directory", "out/\x1b[2J"),
            2,
            "error: [Errno 21] Is a directory: ",
        ),
        (OSError(28, "No space left on device"), 2, "make room and start the same command again"),
        (ConnectionResetError("by TOKEN@peer"), 1, "ConnectionResetError"),
    ],
)
def test_every_error_reaches_its_user_masked(
    capsys: pytest.CaptureFixture[str], error: Exception, status: int, told: str
) -> None:
    def fail(argv: object) -> None:
        raise error

    assert run_command(fail, []) == status
    said = capsys.readouterr().err
    assert told in said
    assert "\x1b" not in said
    assert "https://u:TOKEN" not in said
    assert ("Traceback" in said) == (status == 1)


def test_arguments_that_are_none_are_told_masked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser(prog="convert").parse_args(["--form", "https://u:TOKEN@h"])
    said = capsys.readouterr().err
    assert "convert: error: unrecognized arguments: --form https://*****@h" in said
    assert "TOKEN" not in said


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_stops_nothing(stream: str) -> None:
    program = (
        "import sys; from cmae_scale.core.terminal import tell\n"
        f"for number in range(20_000): tell(number, to=sys.{stream})\n"
        f"sys.exit(75)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **{stream: subprocess.PIPE}) as process:  # type: ignore[call-overload]
        output = getattr(process, stream)
        assert output.readline() == "0\n"
        output.close()
        assert process.wait() == 75
