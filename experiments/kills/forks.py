"""Run a function in a forked process that is killed, or whose writes fail, at a chosen moment.

The parent has imported everything, so that a process costs no imports. Kills and errors at system
calls need strace; all need Linux.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

WRITING_CALLS = (
    *("write", "writev", "pwrite64", "ftruncate", "fsync", "fdatasync", "copy_file_range"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"),
)
"""System calls that change files. An open file that is new is seen at its first write."""
DATA_CALLS = ("write", "writev", "pwrite64", "ftruncate", "fsync", "fdatasync", "copy_file_range")
"""System calls that fail for want of room; the others fail for want of a permission."""
TIMEOUT = 120.0
"""Number of seconds after which a process is taken for hung."""

_CALL = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?P<arguments>.*)")


@dataclass(frozen=True)
class SystemCall:
    """A writing system call of an undisturbed run."""

    name: str
    number: int
    """Position among the calls of this name by the same thread, from 1."""
    is_shared: bool = False
    """Whether a thread makes the call of this name and number to write elsewhere, as to a log."""


@dataclass(frozen=True)
class Interruption:
    """Kill of a process, or failure of its writes, at some moment. Exactly one field is set."""

    seconds: float | None = None
    """Time after the start at which the process is killed."""
    killed_call: SystemCall | None = None
    """Call before which the process is killed."""
    failed_call: SystemCall | None = None
    """Call that fails: with ENOSPC if it writes data, else with EACCES."""
    max_file_bytes: int | None = None
    """Size at which writes to any file fail, as on a full disk."""

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"killed after {self.seconds:.3f} s"
        if self.killed_call is not None:
            return f"killed before {self.killed_call.name} {self.killed_call.number}"
        if self.failed_call is not None:
            return f"{_errno_name(self.failed_call)} at {self.failed_call.name} " + str(
                self.failed_call.number
            )
        return f"files of at most {self.max_file_bytes} bytes"

    def strace_rule(self) -> str | None:
        """Return the argument of strace's option ``-e`` that causes it, or None."""
        if self.killed_call is not None:
            return f"inject={self.killed_call.name}:signal=KILL:when={self.killed_call.number}"
        if self.failed_call is not None:
            name, number = self.failed_call.name, self.failed_call.number
            return f"inject={name}:error={_errno_name(self.failed_call)}:when={number}"
        return None


@dataclass(frozen=True)
class Outcome:
    """End of a process: its status, its output and its duration."""

    status: int
    """Exit status, or the negative number of the signal that ended it."""
    output: str
    errors: str
    seconds: float
    has_hung: bool = False
    """Whether it did not end within `TIMEOUT`, and was killed for that."""

    @property
    def is_killed(self) -> bool:
        """Whether SIGKILL ended it, in time."""
        return self.status == -signal.SIGKILL and not self.has_hung

    def find_fault(self) -> str | None:
        """Return what is wrong with the end of a command: it must succeed or print its error.

        An error is a last line ``error: ...``, or ``NAME is left out: ...`` of `vlduet data fetch`,
        with exit status 1 and no traceback.
        """
        if self.has_hung:
            return f"no end after {TIMEOUT:.0f} s"
        lines = [line for line in self.errors.splitlines() if line.strip()]
        last = lines[-1][:200] if lines else "nothing on stderr"
        if "Traceback (most recent call last)" in self.errors or "panicked at" in self.errors:
            return f"a traceback: {last}"
        if self.status == 0:
            return None
        is_error = last.startswith("error: ") or " is left out: " in last
        if self.status == 1 and is_error:
            return None
        return f"exit status {self.status}: {last}"


def run_forked(
    function: Callable[[], object],
    *,
    folder: Path,
    interruption: Interruption | None = None,
    trace: Path | None = None,
) -> Outcome:
    """Call a function in a new process with the working directory `folder`; return how it ended.

    An exception other than SystemExit is printed, and the exit status is then 70. All processes
    that it started are killed at its end.

    Args:
        function: its standard output and standard error are captured.
        folder: existing folder.
        interruption: what happens to the process; None lets it finish.
        trace: file that gets strace's lines of all writing system calls, with the paths of files.

    Raises:
        RuntimeError: strace could not be attached.
    """
    rule = interruption.strace_rule() if interruption else None
    is_traced = rule is not None or trace is not None
    output, errors = os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        limit = interruption.max_file_bytes if interruption else None
        _run_child(function, folder, (output[1], errors[1]), limit=limit, is_traced=is_traced)
    os.close(output[1])
    os.close(errors[1])
    tracer = None
    if is_traced:
        os.waitpid(pid, os.WUNTRACED)
        tracer = _attach_strace(pid, rule, trace)
        start = time.monotonic()
        os.kill(pid, signal.SIGCONT)
    texts = {output[0]: b"", errors[0]: b""}
    kill_after = interruption.seconds if interruption else None
    status, is_late = _wait(pid, texts, kill_after=TIMEOUT if kill_after is None else kill_after)
    seconds = time.monotonic() - start
    if tracer is not None:
        tracer.communicate(timeout=TIMEOUT)
    for descriptor in texts:
        os.close(descriptor)
    stdout, stderr = (texts[pipe[0]].decode(errors="replace") for pipe in (output, errors))
    return Outcome(status, stdout, stderr, seconds, has_hung=is_late and kill_after is None)


def _run_child(
    function: Callable[[], object],
    folder: Path,
    pipes: tuple[int, int],
    *,
    limit: int | None,
    is_traced: bool,
) -> None:
    """Run the function in the new process, and end the process; never returns."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(pipes[0], 1)
        os.dup2(pipes[1], 2)
        # The parent's objects may stand for files with a position, which pipes lack.
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", write_through=True)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if is_traced:
            os.kill(os.getpid(), signal.SIGSTOP)
        function()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - the parent reads the traceback
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _attach_strace(pid: int, rule: str | None, trace: Path | None) -> subprocess.Popen[str]:
    """Start strace on a stopped process and its future threads, and wait until it is attached."""
    if rule is None:
        options = ["-y", "-e", "trace=" + ",".join(WRITING_CALLS)]
    else:
        name = rule.removeprefix("inject=").partition(":")[0]
        options = ["-e", f"trace={name}", "-e", rule]
    output = str(trace) if trace is not None else os.devnull
    command = ["strace", "-f", "-o", output, *options, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    if "attached" not in line:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise RuntimeError(f"strace cannot attach: {line.strip()}")
    return tracer


def _wait(pid: int, texts: dict[int, bytes], *, kill_after: float) -> tuple[int, bool]:
    """Wait for the end of a process, kill it after some seconds, and read its pipes into `texts`.

    The processes of its group are killed at its end.

    Returns:
        Its exit status or a negative signal, and whether it was killed.
    """
    end = time.monotonic() + kill_after
    process = os.pidfd_open(pid)
    pipes = set(texts)
    has_ended = is_late = False
    while not has_ended:
        remaining = None if is_late else max(0.0, end - time.monotonic())
        ready, _, _ = select.select([process, *pipes], [], [], remaining)
        if not ready:
            is_late = True
            _kill_group(pid)
        has_ended = process in ready
        for descriptor in pipes.intersection(ready):
            if not _read_into(texts, descriptor):
                pipes.discard(descriptor)
    _kill_group(pid)
    os.close(process)
    _, code = os.waitpid(pid, 0)
    for descriptor in pipes:
        os.set_blocking(descriptor, False)
        with contextlib.suppress(BlockingIOError):
            while _read_into(texts, descriptor):
                pass
    return os.waitstatus_to_exitcode(code), is_late


def _read_into(texts: dict[int, bytes], descriptor: int) -> bool:
    """Append what a pipe holds to its text; return whether there was anything."""
    data = os.read(descriptor, 1 << 16)
    texts[descriptor] += data
    return bool(data)


def _kill_group(pid: int) -> None:
    """Kill the processes of the group that `pid` leads, if there are any."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def read_trace(trace: Path, folder: Path) -> list[SystemCall]:
    """Return the writing system calls that a trace lists, on files below `folder`, in its order.

    A call is below `folder` if its line names a path there, or a relative one.
    """
    calls = []
    elsewhere = set()
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for line in trace.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _CALL.match(line)
        if match is None or match["name"] not in WRITING_CALLS:
            continue
        counts[match["thread"], match["name"]] += 1
        arguments = match["arguments"]
        is_relative = match["name"] not in DATA_CALLS and '"/' not in arguments
        call = SystemCall(match["name"], counts[match["thread"], match["name"]])
        if str(folder) in arguments or is_relative:
            calls.append(call)
        else:
            elsewhere.add(call)
    return [replace(call, is_shared=call in elsewhere) for call in calls]


def choose_calls(calls: list[SystemCall], count: int, generator: random.Random) -> list[SystemCall]:
    """Return `count` calls in turn of every name, with repetitions only if there are too few.

    Taking turns gives the few renames the chance of the many writes. Raises ValueError without any
    call.
    """
    by_name: dict[str, list[SystemCall]] = defaultdict(list)
    for call in calls:
        by_name[call.name].append(call)
    chosen: list[SystemCall] = []
    while len(chosen) < count:
        remaining = {name: [*group] for name, group in by_name.items()}
        if not remaining:
            raise ValueError("no system call")
        while any(remaining.values()):
            for group in filter(None, remaining.values()):
                chosen.append(group.pop(generator.randrange(len(group))))
    return chosen[:count]


def _errno_name(call: SystemCall) -> str:
    """Return the name of the error with which a call fails."""
    return "ENOSPC" if call.name in DATA_CALLS else "EACCES"
