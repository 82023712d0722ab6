"""Readers of what people have: a source lists its items cheaply, and reads one when it is written.

One file per kind. To add one: a function from a SourceRequest to `dict[split, Source]`, and its line here.
Imports core, and of data only the index and the tar reader.
"""

import functools
from collections.abc import Callable

from data_prep.sources.arrays import SPLITS, list_arrays
from data_prep.sources.columns import list_huggingface
from data_prep.sources.csv_list import list_csv
from data_prep.sources.digits import list_digits
from data_prep.sources.folders import list_flat, list_imagefolder
from data_prep.sources.imagenet import list_imagenet
from data_prep.sources.sample_tars import list_webdataset
from data_prep.sources.source import Read, Source, SourceRequest

SOURCES: dict[str, Callable[[SourceRequest], dict[str, Source]]] = {
    "imagefolder": list_imagefolder,
    "flat": list_flat,
    "csv": list_csv,
    "imagenet": list_imagenet,
    "webdataset": list_webdataset,
    "huggingface": list_huggingface,
    "digits": list_digits,
    **{name: functools.partial(list_arrays, name) for name in SPLITS},
}

__all__ = ["SOURCES", "Read", "Source", "SourceRequest"]
