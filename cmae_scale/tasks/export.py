"""The encoder of a run at any point, for others: no data, no engine and no GPU are needed."""

from cmae_scale.config.run_file import Run
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.terminal import tell
from cmae_scale.core.world import read_world
from cmae_scale.models.export import export_run
from cmae_scale.models.formats.run_states import RunState, open_run
from cmae_scale.models.weights import say_how_to_load
from cmae_scale.report import read_metrics


def export_newest(run: Run) -> None:
    """Write RUN/encoder from the newest whole checkpoint in the run folder; the first of many processes does.

    What is written follows from the run file in the state. ConfigError when there is no state.
    """
    if not read_world().is_first:
        return
    state = open_run(run.out)
    if not isinstance(state, RunState):
        raise ConfigError(f"{run.out} holds no checkpoint of a pre-training run: name its folder with --out")
    log = run.out / "metrics.jsonl"
    lines = [line for line in read_metrics(log) if "loss" in line] if log.is_file() else []
    known = [line for line in lines if line["step"] <= state.step]
    written = state.read_run(out=run.out)
    export_run(written, state.read("online_encoder"), metrics=known[-1] if known else {})
    folder = run.out / "encoder"
    how = say_how_to_load(written.cmae.model, folder=folder)
    tell("\n".join([*state.notices, f"encoder {folder} ({how})"]))
