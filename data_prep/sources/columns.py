"""Hugging Face data sets: a folder written by save_to_disk (Arrow), or Parquet files. Needs pyarrow only."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.core.strict_json import parse_json
from data_prep.listing import Listing
from data_prep.sources.column_files import list_arrow, list_parquet, open_arrow, read_arrow, stage_parquet
from data_prep.sources.source import Source, SourceRequest, find_below, say_kind, show_path
from data_prep.sources.splits import find_role, group_files
from data_prep.sources.tables import choose_label_column, list_tables, say_labels
from data_prep.unlisted import Unlisted, is_clutter

METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
SHARD_OF_SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}.*")  # as the Hub names them


class Columns(NamedTuple):
    """Which columns are the image and the label, and the names of the classes if the schema has them."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def list_huggingface(request: SourceRequest) -> dict[str, Source]:
    """ROOT: what `save_to_disk` wrote, a Parquet file, a pattern, or a folder of them, with its splits."""
    if request.root is None:
        raise ConfigError("--source huggingface needs --root, a save_to_disk folder or Parquet files")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigError('--source huggingface needs pyarrow: pip install "cmae-scale[datasets]"') from None
    files = _find_files(request.root, merge=request.merge_splits)
    first = next(path for paths in files.values() for path in paths)
    columns = _choose_columns(_read_schema(first), request, first)
    listings, classes = _list_rows(files, columns, place=f"{request.root}: column '{columns.label}'")
    notes = (f"images: column '{columns.image}'", *say_labels(columns.label, classes, request))
    sources = {}
    for split, paths in files.items():
        title = f"huggingface {show_path(request.root)} {split}".strip()
        names, items = tuple(str(path) for path in paths), listings[split]
        if not items:
            raise ConfigError(f"{title} holds no row")
        read = functools.partial(read_arrow, names, columns.image)
        stage = functools.partial(stage_parquet, names, columns.image, len(items))
        sources[split if len(files) > 1 else ""] = Source(
            title, items, classes, read, stage if _is_parquet(first) else None, notes=notes
        )
    _note_others(request.root, files, next(iter(sources.values())).unlisted)
    return sources


def _note_others(root: Path, files: Mapping[str, list[Path]], unlisted: Unlisted) -> None:
    """Note what lies in a folder of Parquet files beside those that are read."""
    read = {path for paths in files.values() for path in paths}
    above = {folder for path in read for folder in path.parents}
    for folder in sorted({path.parent for path in read} | {root}) if root in above else ():
        for path in sorted(folder.iterdir()):
            if path not in read and path not in above and path.name not in METADATA:
                name = f"{path.relative_to(root)}{'/' if path.is_dir() else ''}"
                unlisted.add(name, is_clutter(path.name) or "beside the files of the data set")


def _find_files(root: Path, *, merge: bool) -> dict[str, list[Path]]:
    """The files of each split, in order; with `merge` all as one."""
    files = _find_arrow(root) or _find_parquet(root, merge=merge)
    return {"": [path for paths in files.values() for path in paths]} if merge else files


def _find_arrow(root: Path) -> dict[str, list[Path]]:
    if (root / "dataset_dict.json").exists():
        names = _read_names(root / "dataset_dict.json", lambda content: content["splits"])
        return {name: _read_state(root / name) for name in names}
    return {"": _read_state(root)} if (root / "state.json").exists() else {}


def _find_parquet(root: Path, *, merge: bool) -> dict[str, list[Path]]:
    if not root.is_dir():
        paths = [root] if root.is_file() else sorted(root.parent.glob(root.name))
    else:
        paths = sorted((*root.glob("*.parquet"), *root.glob("data/*.parquet")))
        folders = [] if paths else [folder for folder in sorted(root.iterdir()) if find_role(folder.name)]
        splits = {folder.name: sorted(folder.glob("*.parquet")) for folder in folders}
        if any(splits.values()):
            return {split: files for split, files in splits.items() if files}
    if not paths:
        raise ConfigError(_say_nothing_found(root))
    named = [(SHARD_OF_SPLIT.fullmatch(path.stem), path) for path in paths]
    by_split: dict[str, list[Path]] = defaultdict(list)
    for name, path in named:
        by_split[name[1] if name else ""].append(path)
    return dict(by_split) if merge or "" not in by_split else group_files(paths)


def _say_nothing_found(root: Path) -> str:
    text = f"--root {root} holds neither a data set written by save_to_disk nor a *.parquet file"
    folder = find_below(root, "dataset_dict.json", "state.json", "*.parquet")
    if folder is None:
        return text
    folder = folder.parent if folder.name == "data" or find_role(folder.name) else folder
    return f"{text}, but {folder} does: write --root {folder}"


def _read_state(folder: Path) -> list[Path]:
    """The Arrow files of one split. Their names come from a file, so they must not lead elsewhere."""
    names = _read_names(
        folder / "state.json", lambda content: [entry["filename"] for entry in content["_data_files"]]
    )
    return [folder / name for name in names]


def _read_names(path: Path, find: Callable[[Any], list[str]]) -> list[str]:
    """Names of files or folders beside `path`. DataError where it holds none."""
    try:
        names = find(parse_json(path.read_bytes()))
        if not all(Path(name).name == name for name in names):
            raise ValueError("it names files outside of its folder")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): copy the data set again") from None
    return names


def _is_parquet(path: Path) -> bool:
    return path.suffix != ".arrow"


def _list_rows(
    files: Mapping[str, list[Path]], columns: Columns, *, place: str
) -> tuple[dict[str, Listing], tuple[str, ...]]:
    tables = {}
    for split, paths in files.items():
        list_rows = list_parquet if _is_parquet(paths[0]) else list_arrow
        tables[split] = functools.partial(list_rows, tuple(str(path) for path in paths), columns.label)
    try:
        return list_tables(tables, place=place, names=() if columns.label is None else columns.classes)
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: column {error} is not the same in all files") from None


def _read_schema(path: Path) -> Any:
    import pyarrow

    try:
        if _is_parquet(path):
            from pyarrow import parquet

            return parquet.read_schema(path)
        return open_arrow(str(path))[0].schema
    except (pyarrow.ArrowInvalid, OSError, IndexError) as error:
        kind = None if path.read_bytes()[:4] == b"PAR1" else say_kind(path)
        raise DataError(kind or f"{path} cannot be read ({error}): copy it again") from None


def _choose_columns(schema: Any, request: SourceRequest, path: Path) -> Columns:
    candidates = [field.name for field in schema if _holds_images(field.type)]
    image = request.image_column or (candidates[0] if len(candidates) == 1 else None)
    if not candidates:
        raise ConfigError(
            f"{path} has no column of encoded images (it has {', '.join(schema.names)}): paths of images are "
            "read from a CSV file, with --source csv"
        )
    if image is None or image not in candidates:
        known = ", ".join(candidates)
        raise ConfigError(f"{path}: write --image_column NAME (columns that hold encoded images: {known})")
    label = choose_label_column(schema.names, request, place=str(path))
    return Columns(image, label, _read_classes(schema, label))


def _read_classes(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """The names that `datasets` keeps of a label column; None where it keeps none, or nothing readable."""
    try:
        metadata = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = (metadata["info"]["features"][label] or {})["names"]
    except (ValueError, LookupError, TypeError):
        return None
    return tuple(map(str, names)) if names else None


def _holds_images(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))
