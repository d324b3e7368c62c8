"""Chat template of a checkpoint: where it is found, and its date, which is fixed.

A template that asks for today's date would give other tokens every day, and a model that was
trained with it other embeddings. It gets a `strftime_now` of its own, which any server of a saved
model uses, too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from vlduet.errors import ModelError
from vlduet.library_errors import COPY_AGAIN
from vlduet.logs import logger
from vlduet.structured_files import read_json

TEMPLATE_FILE = "chat_template.jinja"
LEGACY_FILE = "chat_template.json"
PROCESSOR_FILE = "processor_config.json"
TEMPLATE_FOLDER = "additional_chat_templates"
"""Folder of named templates, such as `default`."""
TEMPLATE_PLACES = f"{TEMPLATE_FILE}, {LEGACY_FILE}, {PROCESSOR_FILE}, tokenizer_config.json"
"""Files in which a chat template is looked for, for messages."""
DEFAULT_NAME = "default"
"""Name of the template that is used of several."""

FIXED_DATE = "1 January 2025"
"""The day that a chat template takes for today."""
FIXED_TIMES = {
    "%-d": "1",
    "%-m": "1",
    "%A": "Wednesday",
    "%B": "January",
    "%D": "01/01/25",
    "%F": "2025-01-01",
    "%H": "12",
    "%I": "12",
    "%M": "00",
    "%R": "12:00",
    "%S": "00",
    "%T": "12:00:00",
    "%X": "12:00:00",
    "%Y": "2025",
    "%Z": "UTC",
    "%a": "Wed",
    "%b": "Jan",
    "%c": "Wed Jan  1 12:00:00 2025",
    "%d": "01",
    "%e": " 1",
    "%f": "000000",
    "%h": "Jan",
    "%j": "001",
    "%m": "01",
    "%p": "PM",
    "%s": "1735732800",
    "%u": "3",
    "%w": "3",
    "%x": "01/01/25",
    "%y": "25",
    "%z": "+0000",
}
"""Directive of `strftime` -> its value at noon of `FIXED_DATE` in UTC, in English."""
CLOCK_FUNCTION = "strftime_now"
"""Function of a chat template that returns the present date and time in a format."""


def read_chat_template(folder: Path, tokenizer_template: Any) -> str | None:
    """Return the chat template that transformers' AutoProcessor takes, with a fixed date.

    That of the processor comes before that of the tokenizer. Of several named templates it is
    `default`. A date is fixed with an INFO message, once per folder and process.

    Args:
        folder: of a checkpoint.
        tokenizer_template: `chat_template` of its tokenizer, in any of transformers' forms.

    Returns:
        The template; None if there is none.

    Raises:
        OSError, ValueError: a file cannot be read or has no valid JSON.
    """
    for source in (_read_processor_template(folder), tokenizer_template):
        template = _select_template(source)
        if template is not None:
            fixed = fix_date(template)
            if fixed != template:
                _log_fixed_date(folder)
            return fixed
    return None


def read_early_template(folder: Path) -> str | None:
    """Return the chat template that models of early versions had: that of the tokenizer alone.

    Its date is fixed. None where the tokenizer has none; raises as `read_chat_template`.
    """
    sources = (_read_named_files(folder), _read_key(folder / "tokenizer_config.json"))
    templates = [template for source in sources if (template := _select_template(source))]
    return fix_date(templates[0]) if templates else None


def _read_processor_template(folder: Path) -> Any:
    """Return the template, or the templates by name, of a folder's processor; None without any."""
    template = _read_key(folder / PROCESSOR_FILE) or _read_key(folder / LEGACY_FILE)
    return _read_named_files(folder) if template is None else template


def _read_named_files(folder: Path) -> dict[str, str]:
    """Return the templates of a folder that have files of their own, by name."""
    paths = {path.stem: path for path in sorted(folder.glob(f"{TEMPLATE_FOLDER}/*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        paths[DEFAULT_NAME] = folder / TEMPLATE_FILE
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def _read_key(path: Path) -> Any:
    """Return the value of `chat_template` in a JSON file; None without the file or the key."""
    if not path.is_file():
        return None
    content = read_json(path, error_class=ModelError, fix=COPY_AGAIN)
    return content.get("chat_template") if isinstance(content, dict) else None


def _select_template(source: Any) -> str | None:
    """Return one template of transformers' forms: a text, texts by name, or a list of both."""
    if isinstance(source, list | tuple):
        source = {entry["name"]: entry["template"] for entry in source}
    if isinstance(source, dict):
        source = source.get(DEFAULT_NAME)
    return source or None


def fix_date(template: str) -> str:
    """Return a chat template in which it is always `FIXED_DATE`; one without a date as it is.

    A definition of `strftime_now` is put before it. Every other character is the template's own.
    """
    if CLOCK_FUNCTION not in template or template.startswith(_clock_macro()):
        return template
    # Where a template begins with white space, its own first line must remain one.
    separator = "%}\n" if template[:1].isspace() else "-%}"
    return f"{_clock_macro()}{separator}{template}"


@functools.cache
def _clock_macro() -> str:
    """Return the definition of `strftime_now` in Jinja, but for the end of its last tag."""
    filters = "".join(
        f' | replace("{directive}", "{value}")' for directive, value in FIXED_TIMES.items()
    )
    head = f"{{%- macro {CLOCK_FUNCTION}(format) -%}}"
    return f"{head}{{{{- format{filters} -}}}}{{%- endmacro "


@functools.cache
def _log_fixed_date(folder: Path) -> None:
    """Log that the date of a folder's template is fixed, unless this process has done so before."""
    logger.info(f"{folder}: the chat template asks for the date; it is always {FIXED_DATE} in it")
