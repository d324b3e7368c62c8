"""Conditions of a filter written as text: ``year>=2024 and tags contains card``.

    key operator value [and key operator value ...]

Operators are ``=`` (or ``==``), ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in`` with values separated
by commas, and ``contains``. Quotes, single or double, enclose a key or a value that contains
``and``, a comma or an operator; a quote inside them is written twice. The text is read once from
left to right, so that the time is proportional to its length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlduet.errors import RetrievalError, quote_value

MAX_TEXT_CHARS = 10_000
"""Number of characters of one text of conditions."""
QUOTES = "\"'"

# Without quantifiers, so that each position is tried in constant time.
_OPERATOR = re.compile(r"==|!=|<=|>=|=|<|>|\s(?:in|contains)(?=\s|$)")
_AND = re.compile(r"\s(?:and|AND)(?=\s|$)")
_OR = re.compile(r"\s(?:or|OR)\s")


@dataclass(frozen=True, slots=True)
class TextCondition:
    """One condition as it is written; the kinds of its values are not known yet."""

    key: str
    operator: str
    values: tuple[str, ...]
    """Values of ``in``, or the one value of another operator."""
    is_quoted: bool
    """Whether the value, or a value of ``in``, is in quotes and therefore a text."""
    text: str
    """The whole text that holds the condition, for the place of an error."""


def split_conditions(text: str) -> list[TextCondition]:
    """Return the conditions of a text, in order.

    Raises:
        RetrievalError: a text that is too long, or no condition, an open quote, text behind a
            quote, or ``or`` between conditions.
    """
    if len(text) > MAX_TEXT_CHARS:
        message = f"a filter of {len(text)} characters"
        fix = f"Write at most {MAX_TEXT_CHARS}"
        raise RetrievalError(message, place="where", fix=fix)
    return _Reader(text.strip()).read_conditions()


class _Reader:
    """Position in a text of conditions, which is read from left to right."""

    def __init__(self, text: str):
        self.text, self.position = text, 0

    def read_conditions(self) -> list[TextCondition]:
        """Return all conditions; raise RetrievalError as `split_conditions`."""
        conditions = [self._read_condition()]
        while self.position < len(self.text):
            match = _AND.match(self.text, self.position)
            if match is None:
                raise self._error("text behind a closing quote")
            self.position = match.end()
            conditions.append(self._read_condition())
        return conditions

    def _read_condition(self) -> TextCondition:
        """Return the condition at the position, which moves to the ``and`` behind it or the end."""
        self._skip_blanks()
        start = self.position
        key = self._read_quoted() if self._at_quote() else None
        match = _OPERATOR.search(self.text, self.position)
        between = self.text[self.position : match.start() if match else None].strip()
        if match is None or (between if key is not None else not between):
            raise self._no_condition_error(start)
        self.position = match.end()
        operator = match[0].strip().replace("==", "=")
        values, is_quoted = self._read_values(is_list=operator == "in")
        if operator in ("in", "contains") and values == [""] and not is_quoted:
            raise self._error(f"a value is missing behind '{operator}'")
        key = between if key is None else key
        return TextCondition(key, operator, tuple(values), is_quoted, self.text)

    def _read_values(self, *, is_list: bool) -> tuple[list[str], bool]:
        """Return the values at the position, and whether one of them is in quotes.

        Values are separated by commas if `is_list`; else there is one value, which may be empty.
        The position moves to the ``and`` behind the values or to the end.
        """
        values, is_quoted, end = [], False, -1
        while True:
            self._skip_blanks()
            if self._at_quote():
                is_quoted = True
                values.append(self._read_quoted())
                begin = self.position
                self._skip_blanks()
                if is_list and self.text.startswith(",", self.position):
                    self.position += 1
                    continue
                # The blank before "and" belongs to it.
                self.position = begin if self.position < len(self.text) else self.position
                return values, is_quoted
            if end < self.position:
                # An empty value may stand directly before its "and".
                match = _AND.search(self.text, max(self.position - 1, 0))
                end = match.start() if match else len(self.text)
            comma = self.text.find(",", self.position, end) if is_list else -1
            value = self.text[self.position : end if comma < 0 else comma].strip()
            self._check_no_or(value)
            values.append(value)
            if comma < 0:
                self.position = end
                return values, is_quoted
            self.position = comma + 1

    def _read_quoted(self) -> str:
        """Return the text of the quotes at the position, which moves behind them."""
        quote, pieces = self.text[self.position], []
        while True:
            end = self.text.find(quote, self.position + 1)
            if end < 0:
                raise self._error("a quote that is not closed")
            pieces.append(self.text[self.position + 1 : end])
            self.position = end + 1
            if not self.text.startswith(quote, self.position):
                return quote.join(pieces)

    def _at_quote(self) -> bool:
        return self.text[self.position : self.position + 1] in tuple(QUOTES)

    def _skip_blanks(self) -> None:
        while self.text[self.position : self.position + 1].isspace():
            self.position += 1

    def _check_no_or(self, value: str) -> None:
        """Raise RetrievalError if an unquoted value continues with ``or`` and a condition."""
        match = _OR.search(value)
        if match and _OPERATOR.search(value, match.end()):
            fix = "Use 'key in a,b' for one of several values, or put the value in quotes"
            raise self._error("'or' between conditions", fix)

    def _no_condition_error(self, start: int) -> RetrievalError:
        """Return the error of a text at `start` that has no key or no operator."""
        if start == 0:
            fix = "Write key=value; operators: = != < <= > >= in contains"
            return RetrievalError(
                f"{quote_value(self.text)} is no condition", place="where", fix=fix
            )
        rest = quote_value(self.text[start:])
        fix = 'Put a value that contains "and" in quotes, such as name="salt and pepper"'
        return self._error(f"{rest} behind 'and' is no condition", fix)

    def _error(self, message: str, fix: str = "") -> RetrievalError:
        """Return an error at this text; without `fix` it tells how quotes are written."""
        fix = fix or 'Write key="value", and a quote inside it twice'
        return RetrievalError(message, place=f"where {quote_value(self.text)}", fix=fix)
