"""The documentation holds: its links lead somewhere, and its commands name what there is."""

import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cmae_scale.config.run_file import RunKind, read_run

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    *REPOSITORY.glob("*.md"),
    REPOSITORY / "ds_configs" / "README.md",
    *(REPOSITORY / "docs").glob("*.md"),
]
SCRIPT = re.compile(r"(?:(cmae_scale|data_prep)/(\w+)\.py|-m (cmae_scale)\.(\w+)\b(?!\.))")
KINDS: dict[str, RunKind] = {"pretrain": "cmae", "plan": "cmae", "transfer": "transfer"}


def list_commands() -> Iterator[tuple[str, str]]:
    """(page, command) of everything in a fenced block, or in backticks, that starts one of our commands."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        quoted = re.findall(r"`(python [^`]+)`", text)
        for line in (line for block in [*blocks, *quoted] for line in block.splitlines()):
            for command in line.split(" && "):
                if SCRIPT.search(command) and "import " not in command:
                    yield page.name, command.strip().removeprefix("$ ").removesuffix(" &")


def read_help(package: str, name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of itself; of `bench kill`, what that part of it says."""
    part = words[:1] if name == "bench" else []
    with suppress(SystemExit):
        importlib.import_module(f"{package}.{name}").main([*part, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(("page", "command"), sorted(set(list_commands())))
def test_a_command_names_files_options_and_settings_that_there_are(
    page: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    match = SCRIPT.search(command)
    assert match is not None
    package, name = match[1] or match[3], match[2] or match[4]
    assert (REPOSITORY / package / f"{name}.py").is_file()
    words = shlex.split(command[match.end() :])
    described = read_help(package, name, words, capsys)
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", described), f"{page}: {name} has no {option}"
    for file in (word for word in words if word.startswith("ds_configs/")):
        assert (REPOSITORY / file).is_file(), f"{page}: {file}"
    if name in KINDS and "--deepspeed_config" in words:
        file = words[words.index("--deepspeed_config") + 1]
        settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)+=", word)]
        read_run(REPOSITORY / file, settings, kind=KINDS[name])


def name_anchor(heading: str) -> str:
    """The anchor that a page's heading gets. Source: GitHub's rule, as github-slugger has it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in map(name_anchor, headings), link


def test_every_page_of_the_documentation_is_reached_from_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert [
        page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name})" not in readme
    ] == []
