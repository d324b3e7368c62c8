"""Mutated files of every format: each is read, or refused by an error of ours, in time.

`--fuzz-rounds N` sets the number of mutations of each format; `make slow` runs many. A failure
prints the seed and the mutated file, which is kept in the folder of the test.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.fake_embedder import FakeModel, write_pairs
from helpers.mutations import choose_mutation
from vlduet.config import load_run_config, save_run_config
from vlduet.data import images
from vlduet.data.quarantine import Quarantine
from vlduet.data.sources import RecordSource
from vlduet.encoders.dual import open_embedder
from vlduet.errors import VLDuetError
from vlduet.library_errors import describe_library_error
from vlduet.model.adapters import LoraSettings
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index, find_index_damage
from vlduet.retrieval.search import SearchOptions, search_vector

MAX_SECONDS = 10.0
"""Time for one mutated file."""
MAX_MESSAGE_LENGTH = 2000
"""Number of characters of an error, which quotes no more than a part of a file."""
MAX_MORE_BYTES = 8 << 30
"""Address space that reading a mutated file may add."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")

Read = Callable[[Path], object]


class OutOfTime(BaseException):
    """Raised by the alarm; not an Exception, so that no reader catches it."""


@contextmanager
def limit_resources() -> Iterator[None]:
    """Bound the time and the address space of the block; raises OutOfTime in Python code."""

    def raise_error(*_: object) -> None:
        raise OutOfTime

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, raise_error)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_MORE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


# ------------------------------------------------------------------ formats


def write_config(folder: Path) -> None:
    save_run_config(load_run_config("vladva"), folder / "run.yaml")


def write_quarantine(folder: Path) -> None:
    quarantine = Quarantine(folder / "x.quarantine.jsonl")
    for number in range(3):
        quarantine.add(f"record {number}", ValueError(f"broken {number}"))


def write_jsonl(folder: Path) -> None:
    write_pairs(folder)
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"image": "images/red.png", "short": ["a", "b"], "long": "c", "metadata": {"a": [1, 2]}},
    ]
    path = next(folder.glob("*.jsonl"))
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(folder: Path) -> None:
    write_pairs(folder)
    next(folder.glob("*.jsonl")).unlink()
    text = 'image,short,year\nimages/red.png,a red square,1\nimages/blue.png,"a, b\nc",2\n'
    (folder / "pairs.csv").write_text(text)


def write_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "b", "c"], "label": [1, 2, 3]})
    pyarrow.parquet.write_table(table, folder / "pairs.parquet")


def write_index(folder: Path) -> None:
    pairs = write_pairs(folder / "source")
    build_index(FakeModel(), pairs, to=folder / "index")


def write_checkpoint(folder: Path) -> None:
    tiny.build_duet_model(folder / "base")


def write_adapter(folder: Path) -> None:
    model = tiny.build_duet_model(folder / "base")
    model.make_trainable(lora=LoraSettings(rank=2), projector=False)
    model.save_pretrained(folder / "model")


def read_records(path: Path) -> None:
    """Read all records of the only file of records, and decode their images."""
    source = next(p for p in path.rglob("*") if p.suffix in (".jsonl", ".csv", ".parquet"))
    for record in RecordSource(source).read(on_error=lambda error: None):
        if record.image is not None:
            images.load_image(record.image)


def search_index(folder: Path) -> None:
    """Look for damage, open the index and search it in all ways."""
    find_index_damage(folder / "index")
    with Index.open(folder / "index", FakeModel()) as index:
        vector = np.ones(FakeModel.dim, np.float32) / np.sqrt(FakeModel.dim).astype(np.float32)
        for where in (None, {"hue": "red"}, ["year>2001"]):
            hits = search_vector(index, vector, k=3, where=where, options=SearchOptions())
            for hit in hits:
                index.get_row(hit.id)
        index.refresh()
        index.count()


FORMATS: dict[str, tuple[Callable[[Path], None], Read, tuple[str, ...], int]] = {
    "config": (write_config, lambda p: load_run_config(p / "run.yaml"), ("*.yaml",), 60),
    "quarantine": (write_quarantine, lambda p: Quarantine(p / "x.quarantine.jsonl"), ("*",), 100),
    "records": (write_jsonl, read_records, ("*.jsonl",), 60),
    "images": (write_jsonl, read_records, ("images/*.png",), 10),
    "csv": (write_csv, read_records, ("*.csv",), 60),
    "parquet": (write_parquet, read_records, ("*.parquet",), 40),
    "index": (write_index, search_index, ("index/*.json", "index/**/*"), 25),
    "checkpoint": (
        write_checkpoint,
        lambda p: open_embedder(p / "base"),
        ("base/*.json", "base/*.json", "base/*"),
        12,
    ),
    "model": (
        write_adapter,
        lambda p: open_embedder(p / "model"),
        ("model/*.json", "model/*"),
        12,
    ),
}
"""Writer of valid files, reader, files that are mutated, and rounds of a short run, by format."""


# ------------------------------------------------------------------ test


@pytest.fixture(scope="module", params=FORMATS)
def valid_files(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Path]:
    """Name of a format, and a folder with valid files of it."""
    folder = tmp_path_factory.mktemp(request.param) / "valid"
    folder.mkdir()
    FORMATS[request.param][0](folder)
    return request.param, folder


def update_hashes(folder: Path, changed: Path) -> None:
    """Write the hash and size of a changed file into the lists of the manifest beside it.

    Otherwise a list of hashes would refuse every mutation, and nothing behind it would be tested.
    """
    import hashlib

    content = changed.read_bytes()
    for manifest in folder.rglob("*.json"):
        if manifest == changed:
            continue
        try:
            values = json.loads(manifest.read_bytes())
        except ValueError:
            continue
        files = values.get("files") if isinstance(values, dict) else None
        name = (
            changed.relative_to(manifest.parent).as_posix()
            if (changed.is_relative_to(manifest.parent))
            else ""
        )
        if isinstance(files, dict) and isinstance(files.get(name), dict):
            facts = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            files[name] |= {key: facts[key] for key in facts if key in files[name]}
            manifest.write_text(json.dumps(values))


def describe_failure(read: Read, folder: Path) -> str | None:
    """Read the files of a folder; return what is wrong with the outcome, or None."""
    started = time.monotonic()
    try:
        with limit_resources():
            read(folder)
    except VLDuetError as error:
        if not 10 < len(str(error)) < MAX_MESSAGE_LENGTH:
            return f"an error of {len(str(error))} characters: {error!s:.100}"
    except OutOfTime:
        return f"no end within {MAX_SECONDS} s"
    except Exception as error:  # noqa: BLE001 - what else may happen is what the test looks for
        if describe_library_error(error) is None:
            return f"{type(error).__module__}.{type(error).__name__}: {error!s:.300}"
    if time.monotonic() - started > MAX_SECONDS:
        return f"more than {MAX_SECONDS} s"
    return None


def test_mutated_files_are_read_or_refused(
    valid_files: tuple[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, valid = valid_files
    _, read, patterns, short_rounds = FORMATS[name]
    rounds = request.config.getoption("--fuzz-rounds") or short_rounds
    first_seed = request.config.getoption("--fuzz-seed")
    assert describe_failure(read, valid) is None, "the files are valid before"
    failures = []
    for seed in range(first_seed, first_seed + rounds):
        rng = random.Random(f"{name} {seed}")
        folder = tmp_path / str(seed)
        shutil.copytree(valid, folder)
        files = sorted(path for path in folder.glob(rng.choice(patterns)) if path.is_file())
        path = rng.choice(files)
        path.write_bytes(choose_mutation(path.name)(path.read_bytes(), rng))
        if rng.random() < 0.7:
            update_hashes(folder, path)
        failure = describe_failure(read, folder)
        if failure is None:
            shutil.rmtree(folder)
        else:
            failures.append(f"seed {seed}: {path}: {failure}")
    assert not failures, "\n" + "\n".join(failures)
