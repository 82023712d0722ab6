"""Schemas and settings page: current, whole, and of one mind with the reader."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cmae_scale.config.cmae import Section
from cmae_scale.config.run_file import read_run
from cmae_scale.config.schema import DIALECT, build_files, build_schema
from cmae_scale.config.study import StudyConfig, read_study
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
FILES = sorted(path for path in FOLDER.rglob("*.json") if path.parent.name != "schema")
SCHEMAS = {kind: build_schema(kind) for kind in ("cmae", "transfer", "study")}


def read(path: Path) -> tuple[str, Any]:
    tree = json.loads(path.read_text())
    return Path(tree["$schema"]).stem, tree


@pytest.mark.parametrize("name", build_files())
def test_what_is_written_from_the_settings_is_current(name: str, repository: Path) -> None:
    written = (repository / name).read_text()
    assert written == build_files()[name], "run python -m cmae_scale.config.schema"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_name_a_schema_that_accepts_them(path: Path) -> None:
    kind, tree = read(path)
    assert (path.parent / tree["$schema"]).resolve() == FOLDER / "schema" / f"{kind}.json"
    jsonschema.Draft202012Validator(SCHEMAS[kind]).validate(tree)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_is_one(kind: str) -> None:
    assert SCHEMAS[kind]["$schema"] == DIALECT
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[kind])


def list_settings(section: type[Section]) -> Iterator[tuple[str, str | None]]:
    for name, field in section.model_fields.items():
        yield f"{section.__name__}.{name}", field.description


def test_every_setting_says_what_it_means() -> None:
    sections = [Section]
    for section in sections:
        sections += section.__subclasses__()
    told = dict(entry for section in sections for entry in list_settings(section))
    assert len(told) > 150
    assert [key for key, text in told.items() if not text or len(text.split()) < 2] == []


def change(tree: Any, keys: list[str], value: object) -> Any:
    changed = copy.deepcopy(tree)
    node = changed
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    node[keys[-1]] = value
    return changed


def list_leaves(kind: str) -> list[list[str]]:
    """Keys of every setting and section of a kind that a schema describes, from the root of a file."""
    sections, found = SCHEMAS[kind]["$defs"], []

    def walk(name: str, keys: list[str]) -> None:
        for key, value in sections[name]["properties"].items():
            found.append([*keys, key])
            for option in (value, *value.get("anyOf", ())):
                if "$ref" in option:
                    walk(option["$ref"].rpartition("/")[2], [*keys, key])

    walk({"cmae": "CmaeConfig", "transfer": "TransferConfig"}[kind], [kind])
    return found


def is_read(tree: Any, kind: str, folder: Path) -> bool:
    path = folder / "run.json"
    path.write_text(json.dumps(tree))
    try:
        read_run(path, kind=kind)  # type: ignore[arg-type]
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(("kind", "name"), [("cmae", "quickstart"), ("transfer", "transfer/knn")])
def test_it_never_rejects_what_the_reader_accepts(kind: str, name: str, tmp_path: Path) -> None:
    _, tree = read(FOLDER / f"{name}.json")
    validator = jsonschema.Draft202012Validator(SCHEMAS[kind])
    assert is_read(tree, kind, tmp_path)
    rejected = 0
    for keys in list_leaves(kind):
        for value in (0, 1, 3, -1, 0.5, 2.0, "none", "10ep", "x", True, None, [], [0.3, 0.4], [1, 2], {}):
            changed = change(tree, keys, value)
            is_valid = validator.is_valid(changed)
            rejected += not is_valid
            assert is_valid or not is_read(changed, kind, tmp_path), (keys, value)
    assert rejected > 500


@pytest.mark.parametrize(("kind", "name"), [("cmae", "quickstart"), ("transfer", "transfer/knn")])
def test_a_typo_is_flagged_at_every_level(kind: str, name: str) -> None:
    _, tree = read(FOLDER / f"{name}.json")
    validator = jsonschema.Draft202012Validator(SCHEMAS[kind])
    for keys in [[""], *list_leaves(kind)]:
        assert not validator.is_valid(change(tree, [*keys[:-1], keys[-1] + "_x"], 1)), keys


def test_the_address_of_a_schema_is_no_setting(tmp_path: Path) -> None:
    _, tree = read(FOLDER / "quickstart.json")
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**tree, "$schema": "elsewhere.json"}))
    run = read_run(path)
    assert "$schema" not in run.deepspeed
    study = read_study(FOLDER / "study" / "cifar.json")
    assert isinstance(study, StudyConfig)
    assert TransferConfig.__doc__
