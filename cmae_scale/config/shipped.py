"""The run files that come with the package, from whatever folder a command is started in."""

from pathlib import Path

SHIPPED = (
    Path(__file__).resolve().parents[2] / "ds_configs"
)  # beside the package, also where a wheel is installed


def find_run_file(name: str | Path) -> Path:
    """The file of this name, or else the shipped one: `ds_configs/transfer/knn.json` or `transfer/knn`.

    A name with an ending, as `knn.json`, is never taken for a shipped one: it was to be somebody's own.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED.parent / path if path.parts[:1] == (SHIPPED.name,) else SHIPPED / f"{path}.json"
    return shipped if shipped.is_file() else path
