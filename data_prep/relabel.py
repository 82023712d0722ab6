"""Sources with other labels than their own: none, or the class numbers of shards that are there."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cmae_scale.core.errors import ConfigError, nearest
from cmae_scale.data.index import parse_index
from data_prep.listing import Listing
from data_prep.sources import Source


def drop_labels(source: Source) -> Source:
    """The source without labels and classes."""
    return _relabel(source, (), {})


def take_classes(source: Source, folder: Path) -> Source:
    """The source with the classes of the shards in `folder`, matched by name.

    ConfigError for a class with images that those shards do not have.
    """
    classes = parse_index(folder).classes
    by_name = {name: label for label, name in enumerate(classes)}
    numbers = {}
    for label, name in enumerate(source.classes):
        if name in by_name:
            numbers[label] = by_name[name]
        elif source.items.labels[label]:
            raise ConfigError(
                f"{source.title} has the class '{name}', which is none of the {len(classes):,} of {folder}"
                f"{nearest(name, by_name)}"
            )
    return _relabel(source, classes, numbers)


def add_classes(source: Source, classes: tuple[str, ...]) -> Source:
    """The source with `classes` first, matched by name, and those of its own that are new behind them."""
    names = (*classes, *(name for name in source.classes if name not in set(classes)))
    by_name = {name: label for label, name in enumerate(names)}
    return _relabel(source, names, {label: by_name[name] for label, name in enumerate(source.classes)})


def _relabel(source: Source, classes: tuple[str, ...], numbers: Mapping[int, int]) -> Source:
    items = Listing(
        item._replace(label=None if item.label is None else numbers.get(item.label)) for item in source.items
    )
    return replace(source, items=items, classes=classes)
