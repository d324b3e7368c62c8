"""Determine how long rows are trained: until the joint row stops improving on validation records.

A schedule belongs to its length, so every length is a training of its own. The lengths of the
protocol are tried in turn, with all pilot seeds; the first one whose successor gains less than the
protocol's limits in hit@10 and in caption cross entropy is enough. The test split is never read.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Pilot, Protocol, StudyPaths
from rows import RowRun, build_config, describe_machine, prepare_corpora, prepare_cross_encoder

from vlduet.config import SourceSection
from vlduet.files import write_text_atomically
from vlduet.logs import logger, read_metrics
from vlduet.train.loop import train
from vlduet.workflows.validation import make_config_validator

HIT_NAMES = ("validation/text_to_image/hit@10", "validation/image_to_text/hit@10")
NATS_NAME = "validation/caption_cross_entropy"


def run_pilot(protocol: Protocol, track: str, paths: StudyPaths) -> None:
    """Train the pilot of a track, and write ``pilot-TRACK.json`` into the folder of the results.

    Finished trainings are used again. Raises KeyError for a track without a pilot.
    """
    pilot = protocol.pilots[track]
    prepare_corpora(paths)
    if "sugar" in protocol.tracks[track].preset:
        prepare_cross_encoder(paths)
    values: dict[int, list[dict[str, float]]] = {}
    for length in pilot.lengths:
        values[length] = [_train_length(protocol, pilot, paths, length, s) for s in pilot.seeds]
        chosen = choose_length(values, pilot)
        content = {
            "row": pilot.row,
            "seeds": pilot.seeds,
            "lengths": {str(steps): seeds for steps, seeds in values.items()},
            "min_hits": pilot.min_hits,
            "min_nats": pilot.min_nats,
            "steps": chosen,
            **describe_machine(),
        }
        text = json.dumps(content, indent=1) + "\n"
        paths.results.mkdir(parents=True, exist_ok=True)
        write_text_atomically(paths.results / f"pilot-{track}.json", text)
        if chosen is not None:
            break
    logger.info(f"{track}: {chosen or 'more than the longest number of'} steps are enough")


def _train_length(
    protocol: Protocol, pilot: Pilot, paths: StudyPaths, length: int, seed: int
) -> dict[str, float]:
    """Train the pilot's row for a number of steps unless that is done; return its validation.

    The keys are ``hit@10``, in percent and the mean of both directions, ``nats`` and ``minutes``.
    """
    row = protocol.rows[pilot.row].model_copy(update={"steps": length})
    run = RowRun(pilot.row, row, seed, paths)
    config = build_config(protocol, run, paths.substitutions())
    data = config.data.model_copy(
        update={"validation": SourceSection(path=paths.data / "stamps" / "val.jsonl")}
    )
    settings = config.train.model_copy(update={"eval_every": length})
    folder = paths.work / "pilot" / row.track / f"{length}-seed-{seed}"
    config = config.model_copy(update={"out": folder, "data": data, "train": settings})
    if not (folder / "model").exists():
        start = time.monotonic()
        train(config, evaluate=make_config_validator(config, seed=0), resume="auto")
        logger.info(f"{folder}: {(time.monotonic() - start) / 60:.1f} minutes")
    return read_validation(folder)


def read_validation(folder: Path) -> dict[str, float]:
    """Return the last validation of a run, as `_train_length` does."""
    rows = read_metrics(folder / "metrics.jsonl")
    last = [row for row in rows if NATS_NAME in row][-1]
    return {
        "hit@10": round(100 * float(np.mean([last[name] for name in HIT_NAMES])), 2),
        "nats": round(last[NATS_NAME], 4),
        "minutes": round(last["seconds"] / 60, 2),
    }


def choose_length(values: Mapping[int, Sequence[Mapping[str, Any]]], pilot: Pilot) -> int | None:
    """Return the first length whose successor gains too little, None if each still gains.

    Args:
        values: length -> validation of every seed; ascending lengths.
        pilot: its limits. Both gains must be below them; the means over seeds are compared.
    """
    lengths = list(values)
    for shorter, longer in itertools.pairwise(lengths):
        hits = _mean(values[longer], "hit@10") - _mean(values[shorter], "hit@10")
        nats = _mean(values[shorter], "nats") - _mean(values[longer], "nats")
        if hits < pilot.min_hits and nats < pilot.min_nats:
            return shorter
    return None


def _mean(values: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the mean of one value over seeds."""
    return float(np.mean([seed[name] for seed in values]))
