"""The weights in a run's checkpoints, read without an engine and on any number of processes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from cmae_scale.checkpoints.commit import (
    DESCRIPTION,
    STATE_FORMAT,
    Chosen,
    check_files,
    choose_checkpoint,
    list_checkpoints,
)
from cmae_scale.checkpoints.files import CheckpointReader
from cmae_scale.config.cmae import CmaeConfig, NetworkConfig
from cmae_scale.config.run_file import Run
from cmae_scale.core.errors import ConfigError
from cmae_scale.models.cmae import CMAE
from cmae_scale.models.weights import CONFIG_FILE, WEIGHTS_FILE

CHECKPOINTS = "checkpoints"
_EXPORTS = ("encoder", "model")  # what a finished run leaves: of pre-training, of a transfer


@dataclass(frozen=True)
class RunState:
    """A whole checkpoint of a pre-training run."""

    path: Path
    step: int
    network: NetworkConfig
    run_file: Mapping[str, Any]  # resolved
    files: tuple[Path, ...]
    passed_over: tuple[str, ...]  # what is wrong with newer ones

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of the choice."""
        older = (f"warning: {damage}, so an older checkpoint was taken" for damage in self.passed_over)
        name = Path(str(self.run_file["cmae"].get("out"))).name
        return (*older, f"weights of step {self.step:,} of {name}")

    def read_run(self, *, out: Path) -> Run:
        """The run, which lies in `out` now. ConfigError where this version does not have its settings."""
        tree = dict(self.run_file)
        settings = {**tree.pop("cmae"), "out": str(out)}
        try:
            return Run(self.path / DESCRIPTION, CmaeConfig.model_validate_json(json.dumps(settings)), tree)
        except ValidationError as error:
            raise _unknown_settings(self.path, error) from None

    def read(self, part: str = "") -> dict[str, Tensor]:
        """The model's tensors, or those of a `part` such as "online_encoder" under its own names, in fp32."""
        state, prefix = CheckpointReader(self.files), f"{part}." if part else ""
        with torch.device("meta"):
            model = CMAE(self.network, mask=None)
        parameters = {
            name: state.read("weight", name, 0, parameter.numel()).view(parameter.shape).float()
            for name, parameter in model.named_parameters()
            if name.startswith(prefix)
        }
        buffers = {
            name: state.read_buffer(name, shape=buffer.shape).to(buffer.dtype)
            for name, buffer in model.named_buffers()
            if name.startswith(prefix)
        }
        return {name.removeprefix(prefix): tensor for name, tensor in (parameters | buffers).items()}


def open_run(path: Path) -> RunState | Path:
    """What holds the weights of `path`: of a run its newest whole checkpoint, checked as resuming does.

    A single state, or a folder of states, will do. Of a run without a state, and of a transfer run, it is the
    folder that was exported. Anything that is of no run is given back as it is.
    """
    if (path / WEIGHTS_FILE).is_file():
        return path
    chosen = _choose(path)
    export = next((path / name for name in _EXPORTS if (path / name / CONFIG_FILE).is_file()), None)
    if chosen is None:
        return export or path
    stamp = chosen.description["stamp"]
    if stamp["format"] != STATE_FORMAT:
        raise ConfigError(
            f"{chosen.path} has format {stamp['format']}, this version reads {STATE_FORMAT}: export its "
            "encoder with the version that wrote it"
        )
    if "cmae" in stamp["run"]:
        return _open_state(chosen, stamp["run"])
    if export is None:
        raise ConfigError(
            f"{chosen.path} is a checkpoint of a transfer run: give its folder model/, written once the "
            "run has been validated"
        )
    return export


def _choose(path: Path) -> Chosen | None:
    if (path / DESCRIPTION).is_file():
        damage, description = check_files(path)
        if damage is not None or description is None:
            raise ConfigError(
                f"{damage}: give the run's folder, of which the newest whole checkpoint is taken"
            )
        return Chosen(path, description, ())
    folder = path if list_checkpoints(path) else path / CHECKPOINTS
    return choose_checkpoint(folder, remedy="restore one, or give the folder that the run has exported")


def _open_state(chosen: Chosen, run_file: Mapping[str, Any]) -> RunState:
    """Of the run file only the network is asked, so that checkpoints outlive settings of the method."""
    try:
        network = read_network(run_file["cmae"])
    except ValidationError as error:
        raise _unknown_settings(chosen.path, error) from None
    files = tuple(chosen.path / name for name in sorted(chosen.description["files"]))
    return RunState(
        chosen.path, int(chosen.description["step"]), network, run_file, files, chosen.passed_over
    )


def read_network(settings: Mapping[str, Any]) -> NetworkConfig:
    """The network of a "cmae" object, whatever else stands there. Raises ValidationError."""
    own = {name: settings[name] for name in NetworkConfig.model_fields if name in settings}
    return NetworkConfig.model_validate_json(json.dumps(own))


def _unknown_settings(path: Path, error: ValidationError) -> ConfigError:
    place = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
    return ConfigError(
        f"{path} was written with settings that this version does not have (cmae.{place}): export its "
        "encoder with the version that wrote it"
    )
