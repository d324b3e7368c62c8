"""Reader of WML, the Wesnoth markup language, as far as texts and portraits need it.

Macros (``{...}``) are not expanded, and preprocessor lines (``#ifdef ...``) are ignored, so both
branches are read. What a macro would have added is missing, but nothing is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class WmlBlock:
    """A block ``[name] key=value ... [/name]``, with its nested blocks in file order."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    """Text of each key without its quotes; of a repeated key, the first one."""
    children: list[WmlBlock] = field(default_factory=list)

    def find_blocks(self, *names: str) -> Iterator[WmlBlock]:
        """Yield the blocks below with one of these names, at any depth, in file order.

        Blocks inside a matching block are not searched.
        """
        for block in self.children:
            if block.name in names:
                yield block
            else:
                yield from block.find_blocks(*names)

    def get_text(self, key: str) -> str:
        """Return a text as a player reads it (`clean_text`); empty if the key is missing."""
        return clean_text(self.attributes.get(key, ""))


_TOKEN = re.compile(
    r"""
      \#[^\n]*                                   # comment or preprocessor line
    | <<(?P<raw>.*?)>>                           # raw text
    | \[(?P<close>/?)\+?(?P<tag>[a-z_0-9]+)\]    # begin or end of a block
    | (?P<key>[A-Za-z_][\w,]*)[ \t]*=[ \t]*      # key=
    | "(?P<text>(?:[^"]|"")*)"                   # quoted text, "" is a quote
    | \{(?:[^{}"]|"(?:[^"]|"")*"|\{(?:[^{}"]|"(?:[^"]|"")*")*\})*\}   # macro, nested once
    | \n
    | [^\s"#\[{<\n]+ | [\[{<]                     # unquoted text
    """,
    re.VERBOSE | re.DOTALL,
)


def parse_wml(text: str) -> WmlBlock:
    """Return the blocks of a WML text as children of a root block without a name.

    Keys outside blocks are attributes of the root. Values are joined over ``+``; macros, comments
    and the translation mark ``_`` are dropped.

    Never raises: an end tag closes the innermost open block whatever its name, and blocks that are
    open at the end are closed.
    """
    root = WmlBlock("")
    stack = [root]
    key = ""
    value = ""
    is_continued = False  # a + at the end of the line continues the value in the next one

    def end_attribute() -> None:
        """Store the current key and value in the innermost block, and begin without a key.

        Nothing is stored without a key, or if the block has that key already.
        """
        nonlocal key, value
        if key:
            stack[-1].attributes.setdefault(key, value.strip())
        key = ""
        value = ""

    for match in _TOKEN.finditer(text):
        token = match.group()
        if match["tag"] is not None and (not key or not value.strip()):
            end_attribute()
            if not match["close"]:
                block = WmlBlock(match["tag"])
                stack[-1].children.append(block)
                stack.append(block)
            elif len(stack) > 1:
                stack.pop()
        elif match["key"] is not None and not value.strip():
            end_attribute()
            key = match["key"]
        elif match["text"] is not None:
            value += match["text"].replace('""', '"')
        elif token == "\n":
            if not is_continued:
                end_attribute()
        elif key and not token.startswith(("#", "{")) and token not in ("_", "+"):
            value += token if not value or value.endswith(" ") else f" {token}"
        # A comment or the line break behind the + does not end the continuation.
        if token != "\n" and not token.startswith("#"):
            is_continued = token == "+"
    end_attribute()
    return root


def read_wml(path: Path) -> WmlBlock:
    """Return the root block of a .cfg file, see `parse_wml`; invalid UTF-8 is replaced."""
    return parse_wml(path.read_text(encoding="utf-8", errors="replace"))


def clean_text(text: str) -> str:
    """Return a text without translators' hints, Pango markup, line breaks and repeated blanks.

    A hint is what stands before the first caret: ``female^Elvish Archer``. Text of 60 characters or
    more, or with a line break, before the caret is no hint and stays.
    """
    head, caret, tail = text.partition("^")
    if caret and len(head) < 60 and "\n" not in head:
        text = tail
    tags = r"</?(?:i|b|u|small|big|span|ref|bold|italic|header|img|format)\b[^>]*>"
    return " ".join(re.sub(tags, "", text).split())
