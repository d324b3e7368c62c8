"""Wesnoth's markup language, as far as texts and portraits need it: blocks of attributes, in their order.

Macros ({...}) are not expanded and preprocessor lines (#ifdef ...) are skipped: both branches are read. What a macro would
have made is missing, never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class WmlBlock:
    """``[name] key=value ... [/name]``; nested blocks in their order."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    """Texts without quotes; the first value of a key."""
    children: list[WmlBlock] = field(default_factory=list)

    def find_blocks(self, *names: str) -> Iterator[WmlBlock]:
        """All blocks below of these names, in reading order, none inside another one of them."""
        for block in self.children:
            if block.name in names:
                yield block
            else:
                yield from block.find_blocks(*names)

    def get_text(self, key: str) -> str:
        """A text as a reader sees it: no translator's hints, no markup, white space collapsed; empty if missing."""
        return clean_text(self.attributes.get(key, ""))


_TOKEN = re.compile(
    r"""
      \#[^\n]*                                   # comment or preprocessor line
    | <<(?P<raw>.*?)>>                           # raw text
    | \[(?P<close>/?)\+?(?P<tag>[a-z_0-9]+)\]    # a block begins or ends
    | (?P<key>[A-Za-z_][\w,]*)[ \t]*=[ \t]*      # key=
    | "(?P<text>(?:[^"]|"")*)"                   # quoted text, "" is a quote
    | \{(?:[^{}"]|"(?:[^"]|"")*"|\{(?:[^{}"]|"(?:[^"]|"")*")*\})*\}   # a macro, nested once
    | \n
    | [^\s"#\[{<\n]+ | [\[{<]                     # bare words
    """,
    re.VERBOSE | re.DOTALL,
)


def parse_wml(text: str) -> WmlBlock:
    """The blocks of one file, under a root block without a name. Unbalanced tags close what they can."""
    root = WmlBlock("")
    stack, key, value, joined = [root], "", "", False

    def end() -> None:
        nonlocal key, value
        if key:
            stack[-1].attributes.setdefault(key, value.strip())
        key, value = "", ""

    for match in _TOKEN.finditer(text):
        word = match.group()
        if match["tag"] is not None and (not key or not value.strip()):
            end()
            if not match["close"]:
                block = WmlBlock(match["tag"])
                stack[-1].children.append(block)
                stack.append(block)
            elif len(stack) > 1:
                stack.pop()
        elif match["key"] is not None and not value.strip():
            end()
            key = match["key"]
        elif match["text"] is not None:
            value += match["text"].replace('""', '"')
        elif word == "\n":
            if not joined:
                end()
        elif key and not word.startswith(("#", "{")) and word not in ("_", "+"):
            value += word if not value or value.endswith(" ") else f" {word}"
        # A text goes on in the next line after a +, whatever comment stands behind it.
        if word != "\n" and not word.startswith("#"):
            joined = word == "+"
    end()
    return root


def read_wml(path: Path) -> WmlBlock:
    """Parse a .cfg file."""
    return parse_wml(path.read_text(encoding="utf-8", errors="replace"))


def clean_text(text: str) -> str:
    """Drops translator's hints (``female^Elvish Archer``), Pango markup and line breaks."""
    head, hint, rest = text.partition("^")
    text = rest if hint and len(head) < 60 and "\n" not in head else text
    text = re.sub(
        r"</?(?:i|b|u|small|big|span|ref|bold|italic|header|img|format)\b[^>]*>", "", text
    )
    return " ".join(text.split())
