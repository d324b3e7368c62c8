"""Exceptions of libraries as errors of ours; the only place that knows what libraries raise.

translate_library_errors   around the reading of a file or folder: every exception names it
name_full_disk             around the writing of a file or folder: a lack of space names it
describe_library_error     for an exception that reaches the command line
"""

from __future__ import annotations

import errno
import lzma
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from vlduet.errors import ModelError, VLDuetError, shorten

FORMAT_ERRORS: tuple[type[Exception], ...] = (
    EOFError, SafetensorError, lzma.LZMAError, pickle.UnpicklingError, struct.error,
    tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Exceptions that only a broken or truncated file causes."""
READ_ERRORS: tuple[type[Exception], ...] = (
    *FORMAT_ERRORS, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    MemoryError, OSError, RuntimeError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip
"""What libraries raise on files that are broken, or hold values of other types."""
MEMORY_MESSAGES = (
    "allocate memory", "bad_alloc", "not enough memory", "out of memory", "overflowed with sizes",
    "unable to allocate", "unable to mmap",
)  # fmt: skip
"""Parts of messages, in lower case, of a lack of memory: torch's allocators, numpy, mmap."""
DISK_REASONS = (
    "disk quota exceeded", "file too large", "no space left on device", "disk is full",
)  # fmt: skip
"""Parts of messages, in lower case, that say in words what is full; quoted without the rest."""
DISK_MESSAGES = (
    *DISK_REASONS, "iostream error", "no space left", "os error 27", "os error 28",
    "pytorchstreamwriter failed", "requested and", "unexpected pos",
)  # fmt: skip
"""Parts of messages, in lower case, of a lack of space: torch, numpy, safetensors, LanceDB, SQLite.
"""
MAX_SEARCHED_CHARS = 2000
"""Number of characters of a message in which the place in a library's source is looked for: the
time of that search grows with the square of their number."""
DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a lack of space."""
COPY_AGAIN = "Copy the whole folder again"


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory could not be allocated."""
    text = str(error).lower()
    is_ours = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return is_ours or any(part in text for part in MEMORY_MESSAGES)


def is_lack_of_space(error: BaseException) -> bool:
    """Return whether an exception says that the disk is full, or a quota or limit is reached."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_ERRNOS
    return any(part in str(error).lower() for part in DISK_MESSAGES)


def describe_library_error(error: BaseException) -> tuple[str, str] | None:
    """Return message and remedy of an exception that a file, the disk or the memory has caused.

    The result is None for every other exception, which is a mistake of the program, and for an
    OSError with a file's name that is no lack of space or memory.
    """
    reason = _first_line(error)
    if is_lack_of_memory(error):
        remedy = "Use smaller numbers (batch, rank, dim, tokens), or a machine with more memory"
        return f"too little memory ({reason})", remedy
    if is_lack_of_space(error):
        text = str(error).lower()
        reason = next((words for words in DISK_REASONS if words in text), reason)
        return f"no space left on the disk ({reason})", "Free some space, and start again"
    if isinstance(error, FORMAT_ERRORS):
        return f"a broken or truncated file ({reason})", "Copy the files that you named again"
    if isinstance(error, RecursionError):
        return "values are nested too deeply", "Correct the file that you named"
    if isinstance(error, RuntimeError | ValueError | OSError) and "lance" in str(error).lower():
        return f"a broken index ({reason})", "Copy it again, or delete it and build it again"
    return None


@contextmanager
def translate_library_errors(
    place: object,
    *,
    error_class: type[VLDuetError] = ModelError,
    subject: str = "file",
    fix: str = COPY_AGAIN,
) -> Iterator[None]:
    """Turn what libraries raise in the block (`READ_ERRORS`) into an error at `place`.

    Args:
        place: file or folder that is read, or name of the option that the block depends on.
        error_class: class of the error.
        subject: what is broken, for the message.
        fix: remedy, unless memory or space lack.

    Raises:
        VLDuetError: an instance of `error_class`, with the first line of the exception's message. A
            VLDuetError of the block propagates unchanged.
    """
    try:
        yield
    except VLDuetError:
        raise
    except Exception as error:
        # The tokenizers library raises instances of Exception itself.
        if not isinstance(error, READ_ERRORS) and type(error) is not Exception:
            raise
        if is_lack_of_memory(error) or is_lack_of_space(error):
            message, fix = describe_library_error(error) or ("", fix)
        else:
            message = f"broken {subject} ({_first_line(error)})"
        raise error_class(message, place=place, fix=fix) from error


@contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Turn every exception of the block that means a lack of space into an OSError about `path`.

    Other exceptions propagate unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_lack_of_space(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def _first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, at most 200 characters, or its class."""
    text = str(error).strip()
    if isinstance(error, KeyError):  # its message is the key alone
        return f"the key {shorten(text, 80)} is missing"
    if not text:
        return type(error).__name__
    line = text.splitlines()[0][:MAX_SEARCHED_CHARS]
    # Libraries in Rust add the place in their source.
    return shorten(re.sub(r",?\s*\S+\.rs:\d+(:\d+)?", "", line), 200)
