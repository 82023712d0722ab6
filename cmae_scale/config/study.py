"""A study: encoders pre-trained under the same conditions, and the same tasks for each of them."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from cmae_scale.config.cmae import Section
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.strict_json import parse_json

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class CellConfig(Section):
    """A run: a run file beside the study's, and what is changed of it."""

    config: str
    """A run file, relative to the study's."""
    set: tuple[str, ...] = ()
    """What is changed of it, as "KEY=VALUE"."""


class StudyConfig(Section):
    """Every encoder under every task."""

    pretrain: dict[Name, CellConfig] = Field(min_length=1)
    """The encoders by name."""
    tasks: dict[Name, CellConfig] = Field(min_length=1)
    """The tasks by name, each done with every encoder."""
    random: str | None = None
    """Evaluate an untrained encoder too, built as the one of this name; null = none."""
    out: str | None = None
    """Folder of the study; null = runs/<name of the file>."""

    @model_validator(mode="after")
    def _random_is_known(self) -> "StudyConfig":
        if self.random is not None and self.random not in self.pretrain:
            raise ValueError(f'random "{self.random}" is none of pretrain: {", ".join(self.pretrain)}')
        if "random" in self.pretrain:
            raise ValueError('pretrain: "random" means the untrained encoder, choose another name')
        return self


def read_study(path: Path) -> StudyConfig:
    """The study of a file. ConfigError names the key of a mistake."""
    try:
        return StudyConfig.model_validate_json(json.dumps(_read(path)))
    except OSError as error:
        raise ConfigError(f"study file {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {key + ': ' if key else ''}{first['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read(path: Path) -> object:
    tree = parse_json(path.read_bytes())
    if isinstance(tree, dict):
        tree.pop("$schema", None)  # for editors
    return tree


def dump_study(study: StudyConfig) -> dict[str, object]:
    """The study as JSON values, every default written out."""
    tree: dict[str, object] = json.loads(study.model_dump_json())
    return tree
