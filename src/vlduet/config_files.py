"""Files and overrides of configs as nested dicts of plain values; `vlduet.config` validates them.

1. read       a YAML file is a mapping of keys to values, without repeated keys
2. merge      a file over the one that it extends
3. override   texts such as ``train.lr=1e-4`` set single values
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from vlduet.errors import ConfigError, quote_value
from vlduet.structured_files import require_regular_file

MAX_CONFIG_BYTES = 16 * 2**20
"""Size of the largest YAML file that is read."""
MAX_CONFIG_VALUES = 100_000
"""Largest number of values of a YAML text whose aliases are unfolded."""

# --------------------------------------------------------------------- files


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Return the top-level mapping of one YAML file; ``extends`` is not followed.

    Raises:
        ConfigError: The file is missing, no regular file, larger than `MAX_CONFIG_BYTES`, not
            UTF-8, empty, broken, repeats a key, or is no mapping.
    """
    require_regular_file(path, error_class=ConfigError, max_bytes=MAX_CONFIG_BYTES)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read as text ({error})", place=path, fix="Name a YAML config file"
        ) from None
    tree = parse_yaml(text, place=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            "the file is not a mapping of keys to values",
            place=path,
            fix="Start from a preset, see vlduet config list",
        )
    return tree


def merge_trees(base: Any, changes: Any) -> Any:
    """Return `base` with `changes` applied, without modifying either of them.

    Two mappings are merged key by key, at every depth. Any other value, such as a list, is replaced
    as a whole.
    """
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = merge_trees(base[key], value) if key in base else value
    return merged


# --------------------------------------------------------------------- overrides


def parse_overrides(overrides: Iterable[str], *, place: str) -> dict[str, Any]:
    """Return ``a.b=c`` texts as nested dicts of plain values: ``{"a": {"b": c}}``.

    The values are YAML. Later texts overwrite earlier ones; no texts give {}.

    Raises:
        ConfigError: A text that `apply_override` rejects; `place` is the place in the message.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        try:
            apply_override(tree, override)
        except ConfigError as error:
            raise ConfigError(error.message, place=place, fix=error.fix) from None
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value in `tree`, in place, from a text ``key.subkey=value``.

    Missing sections and those that are null are created, also if an error follows. Items of lists
    have numbers, and the number after the last adds an item. Raises ConfigError for a text without
    key or ``=``, a path through a plain value, a bad index or a value that is not YAML.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(quote_value(override), place="override", fix="Write key.subkey=value")
    *sections, last = key.split(".")
    node: Any = tree
    for name in sections:
        position: str | int = name
        if isinstance(node, list):
            position = _locate_or_append_item(node, name, key)
        elif node.get(name) is None:
            node[name] = {}
        child = node[position]
        if not isinstance(child, dict | list):
            section = key[: key.index(name) + len(name)]
            fix = f"Set it as a whole: {section}={{{last}: ...}}"
            message = f"{quote_value(key)}: {name} is not a section"
            raise ConfigError(message, place="override", fix=fix)
        node = child
    position = last if isinstance(node, dict) else _locate_or_append_item(node, last, key)
    node[position] = parse_yaml(value, place=key)


def _locate_or_append_item(items: list[Any], name: str, key: str) -> int:
    """Return `name` as an index of `items`; for the index after the last, append an empty dict.

    Raises ConfigError, naming the whole `key`, if it is not a number from 0 to ``len(items)``.
    """
    if not name.isdecimal() or int(name) > len(items):
        raise ConfigError(
            f"{quote_value(key)}: {quote_value(name)} is not the number of an item",
            place="override",
            fix=f"Write a number, 0 to {len(items)}",
        )
    if int(name) == len(items):
        items.append({})
    return int(name)


# --------------------------------------------------------------------- YAML


class _YamlLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML loader with two differences from PyYAML's.

    A number such as 1e-4 is a float, as in YAML 1.2 (in YAML 1.1 it is a string). A key that
    occurs twice in a mapping is an error, because the first value would be lost silently.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Return PyYAML's node of the next mapping; raise ComposerError for a repeated scalar key.

        Keys are compared as texts, so that ``1`` and ``"1"`` are the same.
        """
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    problem = f"the key '{key.value}' occurs twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                keys.add(key.value)
        return node

    def flatten_mapping(self, node: Any) -> None:
        """Replace the keys ``<<`` of a node, in place; ConstructorError for too many values."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_CONFIG_VALUES:
            problem = f"more than {MAX_CONFIG_VALUES} keys are merged"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, *, place: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigError: It is broken, nested too deeply, or has aliases that unfold to more than
            `MAX_CONFIG_VALUES` values or contain themselves. The error has the line number where
            PyYAML knows it.
    """
    try:
        value = yaml.load(text, Loader=_YamlLoader)
        _count_values(value, {}, place=place)
        return value
    except RecursionError:
        first_line = quote_value(text.strip().partition("\n")[0])
        message = f"lists or sections are nested too deeply in a text that begins {first_line}"
        raise ConfigError(message, place=place, fix="Write fewer levels") from None
    except (ValueError, OverflowError) as error:  # dates and times that are none, huge integers
        message = f"broken YAML ({error})"
        raise ConfigError(message, place=place, fix="Write texts in quotes") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"broken YAML ({str(getattr(error, 'problem', error)).splitlines()[0]})",
            place=f"{place}:{mark.line + 1}" if mark else place,
            fix="Correct the line",
        ) from None


def _count_values(value: Any, counts: dict[int, int], *, place: str) -> int:
    """Return the number of values within a value and itself, with all aliases unfolded.

    Args:
        value: result of `parse_yaml`.
        counts: results by ``id`` of a list or dict, which are added to; 0 while one is counted.
        place: place of an error.

    Raises:
        ConfigError: A value contains itself, or there are more than `MAX_CONFIG_VALUES`.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counts:
        counts[id(value)] = 0
        total = 1
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            total += _count_values(child, counts, place=place)
            if total > MAX_CONFIG_VALUES:
                message = f"{quote_value(key)} unfolds to more than {MAX_CONFIG_VALUES} values"
                raise ConfigError(message, place=place, fix="Write the values without aliases")
        counts[id(value)] = total
    if counts[id(value)] == 0:
        raise ConfigError("an alias contains itself", place=place, fix="Write it without aliases")
    return counts[id(value)]
