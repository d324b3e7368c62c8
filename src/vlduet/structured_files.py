"""Reading of small files whose content is not trusted: JSON of ours and of checkpoints, headers.

A file must be a regular one (a pipe would never end) and of bounded size. Its content must be
valid, of bounded depth, and of the types that its reader names. Errors name the file and the key.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlduet.errors import ModelError, VLDuetError, quote_value

MAX_JSON_BYTES = 256 * 2**20
"""Size of the largest JSON file that is read; tokenizers of large vocabularies have 30 MB."""
MAX_JSON_DEPTH = 64
"""Largest number of lists and objects within each other."""
MAX_INTEGER = 2**63 - 1
"""Largest absolute value of an integer."""
MAX_HEADER_BYTES = 100_000_000
"""Size of the largest header of a safetensors file, which is the limit of the format."""

FieldTypes = Mapping[str, type | tuple[type, ...]]
"""Key -> accepted types of its value. ``a.b`` is the key `b` of the object `a`; None in a tuple of
types is ``type(None)``. An int is no bool, and is accepted where a float is."""

TYPE_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "an integer",
    list: "a list",
    str: "a text",
    type(None): "null",
}


def require_regular_file(
    path: Path, *, error_class: type[VLDuetError], max_bytes: int | None = None
) -> None:
    """Check that an existing path is a file that can be read to its end; links are followed.

    Args:
        path: the file. Where nothing is, nothing is checked: opening it raises the OSError.
        error_class: class of the error.
        max_bytes: size of the largest file; None for any.

    Raises:
        VLDuetError: of `error_class`, for a folder, pipe, socket or device, or a larger file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise error_class(f"{kind}, not a regular file", place=path, fix="Name a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        message = f"{status.st_size / 2**20:.0f} MiB, more than {max_bytes / 2**20:g} MiB"
        raise error_class(message, place=path, fix="Make it smaller, or name another file")


def read_json(
    path: Path, *, error_class: type[VLDuetError], fix: str, max_bytes: int = MAX_JSON_BYTES
) -> Any:
    """Return the value of a JSON file.

    Args:
        path: the file.
        error_class: class of the error.
        fix: remedy for a broken file, as an imperative sentence.
        max_bytes: size of the largest file.

    Raises:
        VLDuetError: of `error_class`, if it is no regular file, too large, cannot be read, or as
            `parse_json`.
    """
    require_regular_file(path, error_class=error_class, max_bytes=max_bytes)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise error_class("the file is missing", place=path, fix=fix) from None
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise error_class(message, place=path, fix="Check the path and its permissions") from None
    return parse_json(data, place=path, error_class=error_class, fix=fix)


def parse_json(
    data: bytes | str, *, place: object, error_class: type[VLDuetError], fix: str
) -> Any:
    """Return the value of a JSON text; bytes are UTF-8, with or without a byte order mark.

    Raises:
        VLDuetError: of `error_class` at `place`: broken JSON, other bytes than UTF-8, an integer of
            thousands of digits, or more than `MAX_JSON_DEPTH` levels.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text)
        if not _is_within_depth(value):
            raise RecursionError
    except RecursionError:
        message = f"broken JSON (more than {MAX_JSON_DEPTH} lists and objects within each other)"
        raise error_class(message, place=place, fix=fix) from None
    except ValueError as error:
        reason = str(error) if data else "it is empty"
        raise error_class(f"broken JSON ({reason})", place=place, fix=fix) from None
    return value


def read_json_object(
    path: Path,
    fields: FieldTypes | None = None,
    *,
    error_class: type[VLDuetError],
    fix: str,
    optional: FieldTypes | None = None,
) -> dict[str, Any]:
    """Return the object of a JSON file, whose values have the types that are named.

    Args:
        path: the file.
        fields: keys that it must have, with the types of their values.
        error_class: class of the error.
        fix: remedy for a broken file, as an imperative sentence.
        optional: keys that it may have, with the types of their values.

    Raises:
        VLDuetError: of `error_class`, as `read_json` and `check_fields`, and for another value than
            an object.
    """
    value = read_json(path, error_class=error_class, fix=fix)
    check_fields(value, fields, place=path, error_class=error_class, fix=fix, optional=optional)
    return dict(value)


def list_indexed_weights(index: Path) -> set[str] | None:
    """Return the weight files that ``model.safetensors.index.json`` names; None if it is broken."""
    try:
        content = read_json_object(
            index, {"weight_map": dict}, error_class=ModelError, fix="Copy it again"
        )
    except ModelError:
        return None
    return {str(name) for name in content["weight_map"].values()}


def check_fields(
    value: Any,
    fields: FieldTypes | None = None,
    *,
    place: object,
    error_class: type[VLDuetError],
    fix: str,
    optional: FieldTypes | None = None,
) -> None:
    """Check that a parsed value is an object with these keys and types; see `read_json_object`.

    Raises:
        VLDuetError: of `error_class` at `place`, with the key and its value.
    """
    if not isinstance(value, dict):
        message = f"an object is needed, not {quote_value(value)}"
        raise error_class(message, place=place, fix=fix)
    fields = fields or {}
    for key, types in {**fields, **(optional or {})}.items():
        node: Any = value
        *parents, last = key.split(".")
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            if key in fields:
                raise error_class(f"'{key}' is missing", place=place, fix=fix)
            continue
        accepted = types if isinstance(types, tuple) else (types,)
        if not any(_has_type(node[last], kind) for kind in accepted):
            names = " or ".join(TYPE_NAMES[kind] for kind in accepted)
            message = f"'{key}' is {quote_value(node[last])}, not {names}"
            raise error_class(message, place=place, fix=fix)


def _has_type(value: Any, kind: type) -> bool:
    """Return whether a value has a JSON type; see `FieldTypes`. Huge integers have none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return kind in (int, float) and abs(value) <= MAX_INTEGER
    return type(value) is kind


def _is_within_depth(value: Any) -> bool:
    """Return whether at most `MAX_JSON_DEPTH` lists and objects lie within each other."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        children: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                children.extend(node.values())
            elif isinstance(node, list):
                children.extend(node)
        if not children:
            return True
        level = [child for child in children if isinstance(child, dict | list)]
    return not level


def read_safetensors_header(
    path: Path, *, error_class: type[VLDuetError], fix: str
) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """Return the header of a safetensors file as it is written, and its tensors by name.

    Every tensor has ``dtype``, ``shape`` and ``data_offsets``: [begin, end] within the data, which
    begins 8 bytes behind the header's size. ``__metadata__`` is left out.

    Raises:
        VLDuetError: of `error_class`, if it is no regular file, cannot be read, or is not in the
            format: broken JSON, or numbers that do not fit its size.
    """
    require_regular_file(path, error_class=error_class)
    not_safetensors = "not a safetensors file"
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            num_bytes = path.stat().st_size - 8
            if not 0 < size <= min(num_bytes, MAX_HEADER_BYTES):
                message = f"{not_safetensors} (a header of {size} bytes)"
                raise error_class(message, place=path, fix=fix)
            header = file.read(size)
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise error_class(message, place=path, fix="Check the path and its permissions") from None
    tensors = parse_json(header, place=path, error_class=error_class, fix=fix)
    check_fields(tensors, place=path, error_class=error_class, fix=fix)
    tensors.pop("__metadata__", None)
    fields = {"dtype": str, "shape": list, "data_offsets": list}
    for name, tensor in tensors.items():
        check_fields(tensor, fields, place=path, error_class=error_class, fix=fix)
        offsets = tensor["data_offsets"]
        are_integers = all(_has_type(number, int) for number in [*offsets, *tensor["shape"]])
        if not (are_integers and len(offsets) == 2):
            is_valid = False
        else:
            is_valid = 0 <= offsets[0] <= offsets[1] <= num_bytes - size
        if not is_valid or min(tensor["shape"], default=0) < 0:
            message = f"{not_safetensors} (tensor {quote_value(name)} lies outside of the file)"
            raise error_class(message, place=path, fix=fix)
    return header, tensors
