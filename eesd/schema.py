"""Check a configuration against the JSON schema: one precise message for the first mistake, defaults filled in.

    python -m eesd.schema          # the tables of all keys and controllers, as Markdown, for config/README.md

`jsonschema` finds the mistake; this module says it in the words of someone who edits the YAML file.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from eesd.control import CONTROLLERS
from eesd.errors import EesdError, unknown

SCHEMA = Path(__file__).parents[1] / "workflow" / "schemas" / "config.schema.yaml"
Schema = dict[str, Any]


def load_schema() -> Schema:
    """The schema of the configuration, with the sections that have files of their own beside it in place."""
    return copy.deepcopy(_schema())


@cache
def _schema() -> Schema:
    if not SCHEMA.is_file():
        raise EesdError(
            f"{SCHEMA}: no such file. Run from a clone of the repository, installed with `pip install -e .`."
        )
    schema = yaml.safe_load(SCHEMA.read_text())
    for section, part in schema["properties"].items():
        if part.get("$ref", "").endswith(".schema.yaml"):
            schema["properties"][section] = yaml.safe_load((SCHEMA.parent / part["$ref"]).read_text())
    return schema


def fill_and_check(config: dict[str, Any]) -> None:
    """Fill the schema's defaults into `config`, in place; EesdError for the first mistake in it."""
    _check_keys(config, "")
    _check(_schema(), config, "")


def check_entry(section: str, entry: dict[str, Any], where: str) -> None:
    """The same for one entry that a section such as `heads` could hold; mistakes are said to be at `where`."""
    schema = _schema()
    part = next(iter(schema["properties"][section]["patternProperties"].values()))
    _check({**part, "$defs": schema["$defs"]}, entry, where)


def _check(schema: Schema, value: dict[str, Any], where: str) -> None:
    errors = _Validator(schema).iter_errors(value)
    # All errors are consumed first, because defaults are filled in while iterating.
    error = min(errors, key=lambda error: [str(part) for part in error.absolute_path], default=None)
    if error is not None:
        raise _explain(error, where)


def _check_keys(value: Any, where: str) -> None:
    """YAML reads unquoted names such as 4 or yes as something else than text, which JSON schemas cannot express."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise EesdError(
                    f"Configuration, {where or 'top level'}: the name {key!r} is no text. Put it in quotes."
                )
            _check_keys(part, f"{where}.{key}" if where else key)


def _fill_properties(validator: Any, properties: Schema, instance: Any, schema: Schema) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for key, part in properties.items():
            if "default" in part:
                instance.setdefault(key, copy.deepcopy(part["default"]))
    yield from Draft202012Validator.VALIDATORS["properties"](validator, properties, instance, schema)


def _is_integer(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(_: Any, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# JSON Schema takes 2.0 for an integer, and YAML can write .nan: both would fail much later.
_TYPES = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number})
_Validator = extend(Draft202012Validator, {"properties": _fill_properties}, type_checker=_TYPES)


def _explain(error: ValidationError, above: str) -> EesdError:
    where = ".".join(str(part) for part in (*filter(None, [above]), *error.absolute_path))
    place = f"Configuration, {where}: " if where else "Configuration: "
    if error.validator == "additionalProperties":
        return _explain_key(error, place)
    if error.validator == "enum":
        return EesdError(f"{place}{unknown('value', error.instance, map(str, error.validator_value))}")
    if error.validator == "type":
        hint = _number_hint(error.instance)
        expected = (
            error.validator_value if isinstance(error.validator_value, str) else " or ".join(error.validator_value)
        )
        return EesdError(f"{place}expected {expected}, found {json.dumps(error.instance, default=str)}.{hint}")
    meaning = error.schema.get("description")
    return EesdError(f"{place}{error.message}. " + (f"Meaning: {meaning}" if meaning else "See config/README.md."))


def _explain_key(error: ValidationError, place: str) -> EesdError:
    known = error.schema.get("properties", {})
    patterns = error.schema.get("patternProperties", {})
    if patterns:
        bad = next(key for key in error.instance if not _matches(key, error))
        return EesdError(
            f"{place}the name '{bad}' is not usable, because it becomes part of file names. Use lower-case letters, "
            "digits, '.', '_' and '-', with a letter or digit first."
        )
    bad = next(key for key in error.instance if key not in known)
    return EesdError(f"{place}{unknown('key', bad, known)}")


def _matches(key: Any, error: ValidationError) -> bool:
    """True if the name alone is acceptable, whatever stands under it."""
    patterns = dict.fromkeys(error.schema["patternProperties"], True)
    names_only = {"patternProperties": patterns, "additionalProperties": False}
    return isinstance(key, str) and Draft202012Validator(names_only).is_valid({key: None})


def _number_hint(value: Any) -> str:
    try:
        float(value)
    except (TypeError, ValueError):
        return ""
    return " YAML reads 1e-3 as text: write 0.001 or 1.0e-3, without quotes." if isinstance(value, str) else ""


def key_table() -> str:
    """All keys of the configuration with default and meaning, as a Markdown table."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for path, part in _keys(load_schema(), load_schema(), ""):
        default = json.dumps(part["default"]).replace("|", "\\|")
        rows.append(f"| `{path}` | `{default}` | {' '.join(part['description'].split())} |")
    return "\n".join(rows) + "\n"


def _keys(part: Schema, schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    part = {**part, **schema["$defs"][part["$ref"].rsplit("/", 1)[1]]} if "$ref" in part else part
    for key, child in part.get("properties", {}).items():
        yield f"{path}{key}", child
        yield from _keys(child, schema, f"{path}{key}.")
    for child in part.get("patternProperties", {}).values():
        yield from _keys(child, schema, f"{path}NAME.")


def controller_table() -> str:
    """All controllers with their settings and what they do, from their classes, as a Markdown table."""
    rows = ["| controller | settings | rule |", "|---|---|---|"]
    for name in CONTROLLERS.names():
        settings = [field for field in fields(CONTROLLERS[name]) if field.init]
        shown = ", ".join(f"`{field.name}: {json.dumps(field.default)}`" for field in settings)
        rows.append(f"| `{name}` | {shown} | {CONTROLLERS[name].__doc__.strip().splitlines()[0]} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(key_table() + "\n" + controller_table(), end="")
