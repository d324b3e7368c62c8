"""Common parts of the benchmarks: options, model, data, timing in turns, and tables of ratios."""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.utils import logging

from vlduet import __version__
from vlduet.data.formats import read_jsonl
from vlduet.data.records import Record
from vlduet.logs import install_log_handler, logger

WORK_FOLDER = Path("runs/bench")
PACKAGES = ("torch", "transformers", "peft", "sentence-transformers", "trl", "vlduet")

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.simplefilter("ignore")  # deprecations of the peers do not belong into the output


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; log messages go to stderr from now on.

    Args:
        description: docstring of the benchmark, whose first line is shown by --help.
    """
    install_log_handler()
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a model folder (default: nano, built in runs/bench)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="pair records (default: the corpus stamps, fetched into runs/bench)",
    )
    parser.add_argument("--quick", action="store_true", help="use small inputs and few repeats")
    parser.add_argument("--repeats", type=int, help="number of times that everything is measured")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def find_model_folder(folder: Path | None) -> Path:
    """Return the folder of the model to measure: `folder`, or nano, which is built at first use.

    Nano gets random weights, because weights do not change the time.
    """
    if folder is not None:
        return folder
    nano_folder = WORK_FOLDER / "nano"
    if not (nano_folder / "vlduet.json").is_file():
        from vlduet.model import nano

        nano.build_checkpoint(nano_folder, untrained=True)
    return nano_folder


def load_pairs(path: Path | None) -> list[Record]:
    """Return the records of a file that have an image and a short caption.

    Without a path they are those of the training split of stamps, which is downloaded at first use.
    """
    if path is None:
        from vlduet.corpora import catalog

        path = catalog.fetch_corpus("stamps", WORK_FOLDER / "data").folder / "train.jsonl"
    return [record for record in read_jsonl(path) if record.image is not None and record.short]


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of every contender in every repeat.

    All contenders run in every repeat, each time in another order. A machine that becomes slower or
    faster meanwhile therefore does so for all of them.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for position in range(len(names)):
            name = names[(repeat + position) % len(names)]
            start = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            logger.info(f"  {repeat + 1}/{repeats} {name}: {seconds[name][-1]:.2f} s")
    return seconds


def print_ratios(
    title: str, unit: str, seconds: Mapping[str, list[float]], *, work: float, reference: str
) -> None:
    """Print the rate of every contender, and how many times faster `reference` is than it.

    Args: title: heading of the table. unit: unit of the rates, such as "records/s". seconds: the
        result of `time_in_turns`. work: amount of work of one call, in that unit times seconds.
        reference: name of the contender that the others are compared with. The ratio is the median
        over
            the repeats; its smallest and its largest value follow in parentheses.
    """
    print(f"\n{title}")
    print(f"  {'':42} {unit:>12}   {reference} is faster by (min - max)")
    for name, times in seconds.items():
        rate = work / statistics.median(times)
        spread = ""
        if name != reference:
            pairs = zip(times, seconds[reference], strict=True)
            ratios = [their_seconds / our_seconds for their_seconds, our_seconds in pairs]
            median = statistics.median(ratios)
            spread = f"{median:5.2f} x  ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"  {name:42} {rate:12.2f}   {spread}")


def print_environment(options: argparse.Namespace, model: Path) -> None:
    """Print the machine, the versions, the seed and the model of a run."""
    print_machine()
    print_versions()
    size = "quick" if options.quick else "full"
    print(f"run       seed {options.seed}, model {model.name}, {size}", flush=True)


def print_versions() -> None:
    """Print the installed versions of the packages that are compared."""
    print(f"versions  {', '.join(f'{name} {installed_version(name)}' for name in PACKAGES)}")


def print_machine() -> None:
    """Print the GPU, or the CPU and the number of threads, and the operating system."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    print(f"machine   {device}; {platform.system()}, Python {platform.python_version()}")


def _cpu_name() -> str:
    """Return the name of the CPU; outside Linux its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for row in info.read_text().splitlines():
            if row.startswith("model name"):
                return row.split(":")[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_gb() -> float:
    """Return the peak resident memory of this process, in GB.

    On Linux it is read from /proc, because `ru_maxrss` of a child starts at the parent's value.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for row in status.read_text().splitlines():
            if row.startswith("VmHWM"):
                return float(row.split()[1]) / 1e6
    units_per_gb = 1e9 if platform.system() == "Darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gb


def installed_version(name: str) -> str:
    """Return the version of a package, or "missing"; vlduet may run from a checkout."""
    try:
        return version(name)
    except PackageNotFoundError:
        return __version__ if name == "vlduet" else "missing"
