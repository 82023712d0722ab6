"""The settings as JSON Schemas and as a page. `python -m cmae_scale.config.schema` writes both."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmae_scale.config.cmae import CmaeConfig, Section
from cmae_scale.config.deepspeed_keys import TOP_LEVEL
from cmae_scale.config.study import StudyConfig
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.files import write_text

Json = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DEEPSPEED = "https://www.deepspeed.ai/docs/config-json/"
_KINDS: Mapping[str, type[Section]] = {"cmae": CmaeConfig, "transfer": TransferConfig, "study": StudyConfig}
_TITLES = {
    "cmae": "A pre-training run",
    "transfer": "Neighbours, linear probe or fine-tuning of an encoder",
    "study": "A study: several encoders, each under the same tasks",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_NAMES = {"integer": "integer", "number": "number", "string": "string", "boolean": "true, false"}


def build_schema(kind: str) -> Json:
    """JSON Schema of a whole file of `kind`: it accepts all that the reader accepts.

    The reader knows more: what must fit together, and the sections of DeepSpeed.
    """
    settings = _KINDS[kind].model_json_schema(ref_template="#/$defs/{model}")
    sections = settings.pop("$defs")
    head = {"$schema": DIALECT, "title": _TITLES[kind]}
    address = {"type": "string", "description": "This schema, for editors."}
    if kind == "study":
        settings["properties"] = {"$schema": address, **settings["properties"]}
        return {**settings, **head, "$defs": sections}
    others = {name: {"description": f"DeepSpeed's: {_DEEPSPEED}"} for name in sorted(TOP_LEVEL)}
    return {
        **head,
        "type": "object",
        "properties": {"$schema": address, **others, kind: {"$ref": f"#/$defs/{settings['title']}"}},
        "required": [kind],
        "additionalProperties": False,
        "$defs": {**sections, settings["title"]: settings},
    }


def build_page() -> str:
    """docs/settings.md: every setting with its type, default and meaning."""
    lines = [
        "# Settings",
        "",
        "Every setting of a run file, written from the code by `cmae_scale/config/schema.py`, as are",
        "the schemas in `ds_configs/schema/`, by which editors complete and check run files that name one as",
        '`"$schema"`. `--set KEY=VALUE` overrides any setting. Values outside of the bounds are refused.',
    ]
    for kind, title in _TITLES.items():
        lines += ["", f"## {title}"]
        whole = _KINDS[kind].model_json_schema()
        for key, section in _list_sections(whole, whole["$defs"], key="" if kind == "study" else kind):
            lines += ["", f"### {f'`{key}`' if key else 'The file'}", "", section["description"], ""]
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
            lines += _list_rows(section, whole["$defs"])
    return "\n".join(lines) + "\n"


def build_files() -> dict[str, str]:
    """The content of every file that is written from the settings, by its path in the repository."""
    schemas = {
        f"ds_configs/schema/{kind}.json": json.dumps(build_schema(kind), indent=2, ensure_ascii=False) + "\n"
        for kind in _KINDS
    }
    return {**schemas, "docs/settings.md": build_page()}


def _list_rows(section: Json, sections: Json) -> Iterator[str]:
    """The table of a section's settings."""
    for name, value in section["properties"].items():
        default = "required" if name in section.get("required", ()) else _show_default(value, sections)
        # pydantic leaves out what the section says of itself in the same words
        described = value if "description" in value else _find_section(value, sections) or {}
        cells = (f"`{name}`", _describe_type(value, sections), default, described["description"])
        yield "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"


def _list_sections(section: Json, sections: Json, *, key: str) -> Iterator[tuple[str, Json]]:
    """The section and, after it, those inside of it, with their keys."""
    yield key, section
    for name, value in section["properties"].items():
        if (inner := _find_section(value, sections)) is not None:
            inner_key = f"{key}.{name}" if key else name
            yield from _list_sections(inner, sections, key=inner_key)


def _find_section(value: Json, sections: Json) -> Json | None:
    """The section that a setting is, may be, or is a table of."""
    options = [value, *value.get("anyOf", ()), value.get("additionalProperties")]
    for option in options:
        if isinstance(option, dict) and "$ref" in option:
            section: Json = sections[option["$ref"].rpartition("/")[2]]
            return section
    return None


def _describe_type(value: Json, sections: Json) -> str:
    """For instance: integer >= 1, null."""
    if "anyOf" in value:
        return ", ".join(_describe_type(option, sections) for option in value["anyOf"])
    if "enum" in value:
        return ", ".join(f'"{choice}"' for choice in value["enum"])
    if "const" in value:
        return f'"{value["const"]}"'
    if "$ref" in value:
        return "object"
    match value["type"]:
        case "array":
            items = value.get("prefixItems")
            inner = _describe_type(items[0] if items else value["items"], sections)
            return f"list of {len(items)}: {inner}" if items else f"list: {inner}"
        case "object":
            return "object by name"
        case "null":
            return "null"
        case name:
            bounds = [f" {sign} {value[bound]:g}" for bound, sign in _BOUNDS.items() if bound in value]
            return _NAMES[name] + ",".join(bounds)


def _show_default(value: Json, sections: Json) -> str:
    if _find_section(value, sections) is not None and value.get("default") is not None:
        return "see below"
    return f"`{json.dumps(value['default'])}`" if "default" in value else "see below"


def main() -> None:
    """Write the files into the repository."""
    root = Path(__file__).resolve().parents[2]
    for name, text in build_files().items():
        (root / name).parent.mkdir(exist_ok=True)
        write_text(root / name, text)


if __name__ == "__main__":
    main()
