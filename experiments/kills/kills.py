"""Kill every command that writes, let its writes fail, and run it again: nothing may differ.

    python experiments/kills/kills.py --work runs/kills
    python experiments/kills/kills.py --work runs/kills --report

1. prepare   tiny inputs, and what each command starts from
2. measure   an undisturbed run of the command: its duration, its writing system calls, its result
3. disturb   from the same start: kill at a random time or before a system call, let a call fail
             for want of room or of a permission, or limit the size of files as a full disk does
4. read      other commands read what is there: the old or the new result, or one line of error
5. repeat    the same command again; its result must be the undisturbed one

Results are appended to trials.jsonl in the work folder, and an interrupted campaign continues.
`--report` writes experiments/kills/kills.json and the table in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "kills.json"
DOCUMENT = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- kills: begin -->\n", "<!-- kills: end -->\n"
"""Lines of the document around the table."""
KINDS = {"time": 10, "call": 10, "error": 4, "size": 2}
"""Number of interruptions of each command by kind."""
VOLATILE_KEYS = frozenset({"seconds", "seconds a step", "created", "updated", "manifest_sha256"})
"""Keys of JSON objects whose values are times, or hashes of times."""
MAX_ATTEMPTS = 6
"""Number of attempts to kill a process before its end, each at an earlier time."""
MIN_FILE_BYTES, MAX_FILE_BYTES = 64, 1 << 17
"""Range of the sizes at which writes fail."""


def main() -> None:
    """Run the campaign, or write its report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="write the JSON file and the table")
    parser.add_argument("names", nargs="*", metavar="COMMAND", help="by default all commands")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.report:
        write_report(work, options.seed)
        return
    # LanceDB starts its threads anew in a forked process; the parent never uses them.
    warnings.filterwarnings("ignore", message="lancedb fork support")
    from vlduet.locks import lock_folder

    with lock_folder(work):
        Campaign(work, options.seed).run(options.names)


class Campaign:
    """The trials of all commands in a work folder.

    Args:
        work: absolute path of a folder; a campaign in it is continued.
        seed: seed of times, calls and sizes.
    """

    def __init__(self, work: Path, seed: int):
        self.work, self.seed = work, seed
        self.trial = work / "trial"
        self.records = read_trials(work)
        work.mkdir(parents=True, exist_ok=True)
        os.environ["VLDUET_CACHE"] = str(self.trial / "cache")
        os.environ["HF_HOME"] = str(self.trial / "hf")

    def run(self, names: Sequence[str]) -> None:
        """Try all commands, or the named ones; raise SystemExit with a message for a wrong name."""
        from commands import COMMANDS, write_inputs

        unknown = set(names) - {command.name for command in COMMANDS}
        if unknown:
            raise SystemExit(f"no such command: {', '.join(sorted(unknown))}")
        self._prepare("inputs", write_inputs, from_folder=None)
        for command in COMMANDS:
            if not names or command.name in names:
                with command.environment(self.trial):
                    CommandTrials(self, command).run()

    def _prepare(self, name: str, write: Any, *, from_folder: str | None) -> Path:
        """Return the folder `name`, which `write` writes on top of a copy of another one.

        It is written at the place of the trials, because models refer to their bases by absolute
        paths. An existing folder is kept. Raises SystemExit if `write` fails.
        """
        from forks import run_forked

        folder = self.work / name
        if folder.exists():
            return folder
        self.reset_trial(None if from_folder is None else self.work / from_folder)
        outcome = run_forked(write, folder=self.trial)
        if outcome.status != 0:
            raise SystemExit(f"cannot prepare {name}:\n{outcome.errors}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.trial.rename(folder)
        return folder

    def reset_trial(self, start: Path | None) -> None:
        """Make the folder of the trial an empty one, or a copy of another folder."""
        shutil.rmtree(self.trial, ignore_errors=True)
        if start is None:
            self.trial.mkdir(parents=True)
        else:
            shutil.copytree(start, self.trial, symlinks=True)

    def has_trial(self, command: str, kind: str, number: int) -> bool:
        """Return whether a trial was recorded before."""
        trial = {"command": command, "kind": kind, "number": number}
        return any(trial.items() <= record.items() for record in self.records)

    def add(self, record: dict[str, Any]) -> None:
        """Record a trial, and print it if it failed."""
        self.records.append(record)
        with (self.work / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if record["failure"]:
            print("FAILED", json.dumps(record), flush=True)


class CommandTrials:
    """All trials of one command, in its environment."""

    def __init__(self, campaign: Campaign, command: Any):
        self.campaign, self.command = campaign, command
        self.trial = campaign.trial
        self.calls: dict[str, list[Any]] = {}

    def run(self) -> None:
        """Run the command undisturbed, and then every trial that is not recorded yet."""
        from forks import choose_calls, read_trace

        campaign, name = self.campaign, self.command.name
        if all(campaign.has_trial(name, kind, n) for kind in KINDS for n in range(KINDS[kind])):
            return
        self.start = campaign.work / "inputs"
        if self.command.setup is not None:
            label = "starts/" + "".join(c if c.isalnum() else "-" for c in name)
            self.start = campaign._prepare(label, self.command.setup, from_folder="inputs")
        campaign.reset_trial(self.start)
        self.old = self._read_outputs()
        self.old_readings = self._read()
        self._run_command()
        preload_modules(campaign.work)
        trace = campaign.work / "trace.txt"
        traced = self._run_undisturbed(trace)
        result = self._run_undisturbed(None)
        if differences := describe_differences(traced, result):
            raise SystemExit(f"{name}: two undisturbed runs differ: {differences}")
        calls = read_trace(trace, self.trial)
        print(f"{name}: {self.duration:.2f} s, {len(calls)} writing calls", flush=True)
        for kind in ("call", "error"):
            generator = random.Random(f"{campaign.seed}/{name}/{kind}")
            # A process that cannot write to its standard error cannot say so.
            candidates = [call for call in calls if kind == "call" or not call.is_shared]
            self.calls[kind] = choose_calls(candidates, KINDS[kind], generator)
        for kind, count in KINDS.items():
            for number in range(count):
                if not campaign.has_trial(name, kind, number):
                    campaign.add(self._try(kind, number))

    def _run_undisturbed(self, trace: Path | None) -> Mapping[str, Any]:
        """Run the command from its start, set result, readings and duration; return the result."""
        self.campaign.reset_trial(self.start)
        outcome = self._run_command(trace=trace)
        if outcome.status != 0:
            raise SystemExit(f"{self.command.name} fails undisturbed:\n{outcome.errors}")
        self.duration = outcome.seconds
        self.result = self._read_outputs()
        self.new_readings = self._read()
        return self.result

    def _run_command(self, *, retry: bool = False, **options: Any) -> Any:
        """Run the command in the trial's folder; with `retry`, as after an interruption."""
        from commands import run_vlduet
        from forks import run_forked

        arguments = [*self.command.arguments, *(self.command.retry if retry else ())]
        modules = self.campaign.work / "modules.json"

        def run() -> None:
            try:
                run_vlduet(arguments)
            finally:
                if not options:
                    modules.write_text(json.dumps(sorted(sys.modules)))

        return run_forked(run, folder=self.trial, **options)

    def _try(self, kind: str, number: int) -> dict[str, Any]:
        """Disturb the command once, repeat it, and return the record of the trial."""
        moment, outcome = self._disturb(kind, number)
        failures = []
        if not outcome.is_killed and (fault := outcome.find_fault()):
            failures.append(f"disturbed: {fault}")
        if outcome.status == 0 and (difference := self._describe_result()):
            failures.append(f"succeeded with another result: {difference}")
        states, reading_faults = self._check_readings()
        failures += [*self._find_partial_files(), *reading_faults]
        second = self._run_command(retry=True, trace=None)
        if fault := second.find_fault():
            failures.append(f"repeated: {fault}")
        if difference := self._describe_result():
            last = second.errors.strip().splitlines()[-1:] if second.status else []
            failures.append(f"repeated: another result: {difference} {' '.join(last)}"[:600])
        elif self.command.is_read_at_end and self._read() != self.new_readings:
            failures.append("repeated: other commands read another result")
        end = "killed" if outcome.is_killed else f"exit {outcome.status}"
        return {
            "command": self.command.name,
            "kind": kind,
            "number": number,
            "moment": str(moment),
            "end": end,
            "before": states,
            "failure": "; ".join(failures) or None,
        }

    def _disturb(self, kind: str, number: int) -> tuple[Any, Any]:
        """Run the command with an interruption of a kind; return it and the outcome."""
        from forks import Interruption

        generator = random.Random(f"{self.campaign.seed}/{self.command.name}/{kind}/{number}")
        if kind == "time":
            seconds = self.duration * generator.random()
            for attempt in range(MAX_ATTEMPTS):
                moment = Interruption(seconds=seconds * 0.8**attempt)
                self.campaign.reset_trial(self.start)
                outcome = self._run_command(interruption=moment)
                if outcome.is_killed:
                    break
            return moment, outcome
        if kind == "call":
            moment = Interruption(killed_call=self.calls[kind][number])
        elif kind == "error":
            moment = Interruption(failed_call=self.calls[kind][number])
        else:
            ratio = MAX_FILE_BYTES / MIN_FILE_BYTES
            moment = Interruption(max_file_bytes=int(MIN_FILE_BYTES * ratio ** generator.random()))
        self.campaign.reset_trial(self.start)
        return moment, self._run_command(interruption=moment)

    def _find_partial_files(self) -> list[str]:
        """Return the complete files after an interruption that have neither old nor new content."""
        names = [*self.command.outputs, *self.command.complete_files]
        partial = []
        for name, value in self._read_outputs().items():
            is_complete_file = any(fnmatch(name, pattern) for pattern in names)
            if is_complete_file and value not in (self.result.get(name), self.old.get(name)):
                partial.append(f"{name} is neither the old nor the new file")
        return partial

    def _check_readings(self) -> tuple[list[str], list[str]]:
        """Return what each reader finds after an interruption, and faults; the trial is unchanged.

        It finds the old or the new result, a part with a warning, or an error in one line.
        """
        backup = self.trial.with_name("backup")
        shutil.rmtree(backup, ignore_errors=True)
        shutil.copytree(self.trial, backup, symlinks=True)
        states, faults = [], []
        for n, arguments in enumerate(self.command.readers):
            outcome = self._run_reader(arguments)
            reading = strip_volatile_text(outcome.output)
            if fault := outcome.find_fault():
                faults.append(f"{' '.join(arguments[:2])}: {fault}")
            if outcome.status != 0:
                states.append("error")
            elif reading == self.new_readings[n]:
                states.append("new")
            elif reading == self.old_readings[n]:
                states.append("old")
            elif self.command.partly and self.command.partly in outcome.errors:
                states.append("part")
            else:
                faults.append(f"{' '.join(arguments[:2])} reads another result: {reading[:200]}")
        shutil.rmtree(self.trial)
        backup.rename(self.trial)
        return states, faults

    def _read(self) -> list[str]:
        """Return what the readers print, without times; an error is an empty text."""
        outcomes = [self._run_reader(arguments) for arguments in self.command.readers]
        return [strip_volatile_text(o.output) if o.status == 0 else "" for o in outcomes]

    def _run_reader(self, arguments: Sequence[str]) -> Any:
        """Run a reader in the trial's folder, without a network."""
        from commands import run_vlduet
        from forks import run_forked

        def run() -> None:
            from huggingface_hub import constants

            constants.HF_HUB_OFFLINE = True
            run_vlduet(arguments)

        return run_forked(run, folder=self.trial)

    def _describe_result(self) -> str:
        """Return how the outputs differ from those of the undisturbed run; "" if they are equal."""
        return describe_differences(self.result, self._read_outputs())

    def _read_outputs(self) -> dict[str, Any]:
        """Return the content of all outputs by path, and the names in the trial's folder."""
        names = {path.name for path in self.trial.iterdir()}
        # Which files a cache of hashes has depends on times.
        names = {name for name in names - {"cache"} if not _is_ignored(name)}
        content: dict[str, Any] = {"names": sorted(names)}
        for output in self.command.outputs:
            path = self.trial / output
            files = [path] if path.is_file() else sorted(path.rglob("*"))
            for file in files:
                name = file.relative_to(self.trial).as_posix()
                if file.is_file() and not _is_ignored(name):
                    content[name] = read_content(file)
        return content


def _is_ignored(name: str) -> bool:
    """Return whether a file may differ.

    These are tables of LanceDB, which are read by `vlduet search`, logs of tensorboard, whose names
    hold the time, remembered hashes, what huggingface_hub notes beside the files of a model, and
    locks, which do not outlive their process.
    """
    if name.endswith(".lock"):
        return True
    folders = name.split("/")[:-1]
    if "hub" in folders:
        return "snapshots" not in folders
    return not {"store", "tensorboard", "hashes", "huggingface"}.isdisjoint(folders)


def read_content(path: Path) -> Any:
    """Return the content of a file without times: values of JSON, or a hash."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        with contextlib.suppress(ValueError):
            if path.suffix == ".json":
                return strip_volatile(json.loads(data))
            return [strip_volatile(json.loads(line)) for line in data.splitlines()]
    if path.name == "table.md":  # the last column of a comparison is the seconds of a step
        data = b"\n".join(line.rpartition(b" | ")[0] or line for line in data.splitlines())
    return hashlib.sha256(data).hexdigest()


def strip_volatile(value: Any) -> Any:
    """Return a value from JSON without the keys whose values may differ."""
    if isinstance(value, dict):
        names = sorted(value.keys() - VOLATILE_KEYS)
        return {name: strip_volatile(value[name]) for name in names if not _is_ignored(name)}
    if isinstance(value, list):
        return [strip_volatile(item) for item in value]
    return value


def strip_volatile_text(text: str) -> str:
    """Return a text without times, if it is JSON; else the text itself."""
    try:
        return json.dumps(strip_volatile(json.loads(text)))
    except ValueError:
        return text


def describe_differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """Return the names of the values that differ, at most five; "" if all are equal."""
    names = sorted(expected.keys() | actual.keys())
    different = [name for name in names if expected.get(name) != actual.get(name)]
    reasons = []
    for name in different[:5]:
        state = "is missing" if name not in actual else "differs"
        reasons.append(f"{name} {state if name in expected else 'is left over'}")
    return ", ".join(reasons)


def preload_modules(work: Path) -> None:
    """Import what the last command imported, so that later processes need not."""
    for name in json.loads((work / "modules.json").read_text()):
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # not every module can be imported by its name
                importlib.import_module(name)


def read_trials(work: Path) -> list[dict[str, Any]]:
    """Return the recorded trials of a work folder; [] for a new one."""
    from vlduet.files import read_json_lines

    return read_json_lines(work / "trials.jsonl")


# --------------------------------------------------------------------- report


def write_report(work: Path, seed: int) -> None:
    """Write the JSON file of the recorded trials, and their table into the document."""
    from commands import COMMANDS

    from vlduet.files import write_text_atomically

    names = [command.name for command in COMMANDS]
    trials = [trial for trial in read_trials(work) if trial["command"] in names]
    trials.sort(key=lambda trial: names.index(trial["command"]))
    command = f"python experiments/kills/kills.py --seed {seed}"
    results = {"command": command, "machine": describe_machine(), **summarize(trials)}
    write_text_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, tail = text.partition(BEGIN)
    _, _, tail = tail.partition(END)
    write_text_atomically(DOCUMENT, head + BEGIN + format_table(results) + END + tail)


def describe_machine() -> dict[str, Any]:
    """Return the type of the machine and the versions that matter."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), ":unknown")
    return {
        "cpu": model.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def summarize(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return counts by command and kind, what was read before the repetition, and failures."""
    commands: dict[str, dict[str, Any]] = {}
    for trial in trials:
        row = commands.setdefault(trial["command"], {"trials": Counter(), "before": Counter()})
        row["trials"][trial["kind"]] += 1
        row["before"].update(trial["before"])
    failures = [dict(trial) for trial in trials if trial["failure"]]
    for name, row in commands.items():
        row["failures"] = sum(failure["command"] == name for failure in failures)
        row["before"] = dict(sorted(row["before"].items()))
        row["trials"] = {kind: row["trials"][kind] for kind in KINDS}
    return {"commands": commands, "failures": failures}


def format_table(results: Mapping[str, Any]) -> str:
    """Return the Markdown table of the counts, with a row of sums."""
    columns = ("command", "killed at a time", "killed at a call", "failed call", "full disk")
    lines = [f"| {' | '.join(columns)} | read in between | failures |", "|---" * 7 + "|"]
    sums: Counter[str] = Counter()
    for name, row in results["commands"].items():
        counts = {**row["trials"], "failures": row["failures"]}
        sums.update(counts)
        readings = ", ".join(f"{count} {state}" for state, count in row["before"].items())
        cells = [*(counts[kind] for kind in KINDS), readings, counts["failures"]]
        lines.append(f"| `{name}` | {' | '.join(map(str, cells))} |")
    totals = " | ".join(f"**{sums[kind]}**" for kind in KINDS)
    lines.append(f"| **all** | {totals} | | **{sums['failures']}** |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
