"""What the benchmarks share: model and data, interleaved timing, and a table that says on what it was measured."""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging

from vlduet.data.formats import read_jsonl
from vlduet.data.records import Record
from vlduet.logs import install_log_handler, logger

WORK = Path("runs/bench")
logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.simplefilter("ignore")  # the peers' deprecations are not what one reads here


def arguments(about: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    install_log_handler()
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a model folder (default: nano, built in runs/bench)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="pair records (default: the corpus stamps, fetched into runs/bench)",
    )
    parser.add_argument("--quick", action="store_true", help="a small run, for a look")
    parser.add_argument("--repeats", type=int, help="times that everything is measured")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def model_folder(given: Path | None) -> Path:
    """The model to measure; nano is built once. Its weights decide no timing, so random ones do."""
    folder = given or WORK / "nano"
    if given is None and not (folder / "vlduet.json").is_file():
        from vlduet.model import nano

        nano.build_checkpoint(folder, untrained=True)
    return folder


def pairs(given: Path | None) -> list[Record]:
    """Records with an image and a short caption."""
    if given is None:
        from vlduet.corpora import catalog

        given = catalog.fetch_corpus("stamps", WORK / "data").folder / "train.jsonl"
    return [record for record in read_jsonl(given) if record.image is not None and record.short]


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every contender in every repeat. All take part in a repeat, each time in another order, so that a
    machine that grows slower or faster meanwhile does so for all."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for i in range(len(names)):
            name = names[(repeat + i) % len(names)]
            began = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
            logger.info(f"  {repeat + 1}/{repeats} {name}: {seconds[name][-1]:.2f} s")
    return seconds


def table(
    title: str, unit: str, seconds: Mapping[str, list[float]], *, work: float, ours: str
) -> None:
    """Rates, and how many times faster `ours` is than each: median and range of the ratios within a repeat."""
    print(f"\n{title}")
    print(f"  {'':42} {unit:>12}   {ours} is faster by (min - max)")
    for name, times in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(times, seconds[ours], strict=True)]
        rate = work / statistics.median(times)
        spread = (
            f"{statistics.median(ratios):5.2f} x  ({min(ratios):.2f} - {max(ratios):.2f})"
            if name != ours
            else ""
        )
        print(f"  {name:42} {rate:12.2f}   {spread}")


def facts(options: argparse.Namespace, model: Path) -> None:
    """On what it was measured."""
    machine()
    versions()
    print(
        f"run       seed {options.seed}, model {model.name}, {'quick' if options.quick else 'full'}",
        flush=True,
    )


def versions() -> None:
    names = ("torch", "transformers", "peft", "sentence-transformers", "trl", "vlduet")
    print(f"versions  {', '.join(f'{name} {installed(name)}' for name in names)}")


def machine() -> None:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (
                r.split(":")[1].strip()
                for r in info.read_text().splitlines()
                if r.startswith("model name")
            ),
            cpu,
        )
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{cpu}, {torch.get_num_threads()} threads"
    )
    print(f"machine   {device}; {platform.system()}, Python {platform.python_version()}")


def highest() -> float:
    """The most memory that this process has held, in GB. Linux's ru_maxrss would begin with the parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return (
            next(
                float(row.split()[1])
                for row in status.read_text().splitlines()
                if row.startswith("VmHWM")
            )
            / 1e6
        )
    unit = 1e9 if platform.system() == "Darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def installed(name: str) -> str:
    """The version of a package; benchmarks run from a checkout too."""
    from importlib.metadata import PackageNotFoundError

    from vlduet import __version__

    try:
        return version(name)
    except PackageNotFoundError:
        return __version__ if name == "vlduet" else "missing"
