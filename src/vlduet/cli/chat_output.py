"""Output of a conversation at the terminal: answers, retrieved images, search results."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from vlduet.cli._common import print_text
from vlduet.logs import strip_control_characters

if TYPE_CHECKING:
    from vlduet.model.generation.interleave import RetrievedImage, TextDelta
    from vlduet.retrieval.search import Hit
    from vlduet.workflows.chat_session import ChatSession, Notice, Sources

IMAGE_COLOUR = "magenta"
NOTICE_COLOUR = "yellow"
ERROR_COLOUR = "red"
CAPTION_CHARS = 80
"""Number of characters that are printed of the text of a document."""


def print_line(text: str, colour: str | None = None, *, to_stderr: bool = False) -> None:
    """Print one line without control characters, coloured on a terminal."""
    stream = sys.stderr if to_stderr else sys.stdout
    line = strip_control_characters(text, keep="\t")
    typer.secho(line, fg=colour if stream.isatty() else None, err=to_stderr)


def print_error(error: object) -> None:
    """Print the message of an error on standard error."""
    print_line(f"error: {error}", ERROR_COLOUR, to_stderr=True)


def print_notice(text: str) -> None:
    """Print a sentence about the conversation, which is not part of it."""
    print_line(f"({text})", NOTICE_COLOUR)


def format_caption(text: str) -> str:
    """Return the text of a document on one line, without control characters, and shortened."""
    line = " ".join(strip_control_characters(text).split())
    return line if len(line) <= CAPTION_CHARS else line[: CAPTION_CHARS - 1].rstrip() + "…"


def print_hits(session: ChatSession, hits: Iterable[Hit]) -> None:
    """Print documents by rank, each with its image on a line of its own."""
    for hit in hits:
        caption = format_caption(hit.text)
        print_line(f"[{hit.rank}] {hit.score:.3f}  {hit.id}  {caption}".rstrip())
        if hit.image is not None:
            number = session.number_image(hit.image)
            print_line(f"    image {number}: {hit.image.name}", IMAGE_COLOUR)


class AnswerPrinter:
    """Printer of the events of one answer, in their order."""

    def __init__(self, session: ChatSession):
        """Begin at the start of a line."""
        self._session = session
        self._is_line_start = True
        self._sources: Sources | None = None

    def print_event(self, event: Sources | Notice | TextDelta | RetrievedImage[Hit]) -> None:
        """Print a piece of text at once, and an image on lines of its own.

        Documents that the prompt quotes are printed by `finish`.
        """
        from vlduet.model.generation.interleave import RetrievedImage
        from vlduet.workflows.chat_session import Notice, Sources

        if isinstance(event, Sources):
            self._sources = event
        elif isinstance(event, Notice):
            print_notice(event.text)
        elif isinstance(event, RetrievedImage):
            self.end_line()
            assert event.hit.image is not None
            number = self._session.number_image(event.hit.image)
            caption = format_caption(event.hit.text)
            path = event.hit.image.name
            print_line(f"    image {number} ({event.score:.3f}): {path}", IMAGE_COLOUR)
            if caption:
                print_line(f"    {caption}", IMAGE_COLOUR)
        else:
            text = event.text.lstrip() if self._is_line_start else event.text
            print_text(text, end="")
            self._is_line_start = self._is_line_start and not text

    def end_line(self) -> None:
        """End a line that has text."""
        if not self._is_line_start:
            print_text("")
        self._is_line_start = True

    def print_sources(self) -> None:
        """Print the documents that the prompt quotes, if the answer was to have any."""
        if self._sources is None:
            return
        if not self._sources.hits:
            print_notice("No sources: nothing in the index matches.")
            return
        print_line("Sources:")
        print_hits(self._session, self._sources.hits)
