"""Measure models out of their domain: retrieval of drawings that nothing was trained on.

    vlduet data fetch clipart --to runs/clipart/data
    python experiments/nano/clipart.py --work runs/clipart --to clipart.json NAME=FOLDER ...

measures every model folder under its name, beside chance and the ridge baseline, which is fitted
on the training records of the demo, and on these and those of emoji. The gallery has `MAX_RECORDS`
records, evenly spaced in the corpus. The file keeps the rank of every query: models can be added
later, and are compared in pairs with all that it has. `--work` gets the corpora that it lacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.corpora.catalog import fetch_corpus
from vlduet.data.formats import read_jsonl
from vlduet.data.record_json import record_to_json
from vlduet.data.records import Record
from vlduet.demo.encoders import fetch_minilm_folder
from vlduet.demo.measure import fit_ridge_baseline
from vlduet.demo.prepare import prepare_data
from vlduet.encoders.frozen import FrozenEncoders
from vlduet.encoders.loading import open_encoder
from vlduet.errors import DataError
from vlduet.eval.examples import evenly_spaced
from vlduet.eval.metrics import HIT_CUTOFFS, bootstrap_interval, chance_hit_at_k, paired_bootstrap
from vlduet.eval.protocols import RetrievalResult, measure_retrieval
from vlduet.files import write_text_atomically
from vlduet.logs import install_log_handler, logger
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache

MAX_RECORDS = 600
RIDGE_ROWS = {"ridge, stamps": False, "ridge, stamps and emoji": True}
"""Name of each baseline's row, and whether it is fitted on emoji too."""
EMOJI_VENDOR = "openmoji"
DIRECTIONS = ("text_to_image", "image_to_text")

Ranks = dict[str, list[int]]
"""Rank of the best relevant item for every query, by direction."""


def describe_gallery(records: list[Record]) -> dict[str, Any]:
    """Return the number of records, and a hash of their names and captions in their order."""
    content = json.dumps([[record.id, *record.short] for record in records])
    return {"records": len(records), "sha256": hashlib.sha256(content.encode()).hexdigest()}


def collect_ranks(result: RetrievalResult) -> Ranks:
    """Return the ranks of a result in both directions."""
    return {name: getattr(result, name).ranks.tolist() for name in DIRECTIONS}


def measure_ridge(
    model: DuetModel, records: list[Record], work: Path, *, with_emoji: bool
) -> RetrievalResult:
    """Fit the ridge baseline as the demo does, and measure it on other records.

    The corpora, and the features of the frozen encoders, are written into `work`.

    Args:
        model: Model whose vision tower the baseline reads.
        records: Records to retrieve.
        work: Folder of the command line.
        with_emoji: Fit it on one vendor's training emoji too, not only on the demo's stamps.
    """
    encoders = FrozenEncoders(
        {"text": open_encoder(fetch_minilm_folder())}, cache=FeatureCache(work / "features")
    )
    data = replace(prepare_data(work), held_out=tuple(records))
    if with_emoji:
        emoji = read_jsonl(fetch_corpus("emoji", work / "data").folder / "train.jsonl")
        pairs = [record for record in emoji if record.metadata["vendor"] == EMOJI_VENDOR]
        rows = [
            record_to_json(record, root=work / "data")
            for record in (*read_jsonl(data.train_file), *pairs)
        ]
        data = replace(data, train_file=work / "data/stamps-and-emoji.jsonl")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        data.train_file.write_text("".join(lines), encoding="utf-8")
    return fit_ridge_baseline(model, data, encoders=encoders)


def compute_hit_values(ranks: Ranks) -> dict[str, np.ndarray]:
    """Return float[Q] arrays with 1 for a hit, keyed ``DIRECTION/hit@K``."""
    return {
        f"{direction}/hit@{k}": (np.array(ranks[direction]) <= k).astype(np.float64)
        for direction in DIRECTIONS
        for k in HIT_CUTOFFS
    }


def compare_rows(ranks: dict[str, Ranks]) -> dict[str, Any]:
    """Return the hit rates of every row, and their differences to each earlier row.

    All of them are ``{"mean", "low", "high"}`` with the 95 % bootstrap interval over queries;
    differences are paired, and keyed ``"LATER - EARLIER"``.
    """
    values = {name: compute_hit_values(row) for name, row in ranks.items()}
    names = list(values)
    pairs = [(later, earlier) for i, later in enumerate(names) for earlier in names[:i]]
    hit_rates = {}
    for name, row in values.items():
        hit_rates[name] = {key: asdict(bootstrap_interval(hits)) for key, hits in row.items()}
    differences = {}
    for later, earlier in pairs:
        differences[f"{later} - {earlier}"] = {
            key: asdict(paired_bootstrap(values[later][key], values[earlier][key]))
            for key in values[later]
        }
    return {"hit rates": hit_rates, "differences": differences}


def read_results(path: Path, gallery: dict[str, Any]) -> dict[str, Any]:
    """Return the results in a file of the same gallery; without a file, empty ones.

    Raises:
        DataError: The file is of another gallery.
    """
    if not path.exists():
        return {"gallery": gallery, "chance": {}, "ranks": {}}
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if results["gallery"] != gallery:
        raise DataError("the results are of other records", place=path, fix="Choose another --to")
    return results


def main() -> None:
    """Measure the models of the command line, and write the results after each of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, required=True, help="folder of data and features")
    parser.add_argument("--to", type=Path, required=True, help="JSON file to write or extend")
    options = parser.parse_args()
    install_log_handler()
    folder = fetch_corpus("clipart", options.work / "data").folder
    records = evenly_spaced(list(read_jsonl(folder / "test.jsonl")), MAX_RECORDS)
    results = read_results(options.to, describe_gallery(records))
    for argument in options.models:
        name, _, model_folder = argument.partition("=")
        model = DuetModel.from_pretrained(model_folder)
        model.feature_cache = FeatureCache(options.work / "features")
        for row, with_emoji in RIDGE_ROWS.items():
            if row in results["ranks"]:
                continue
            ridge = measure_ridge(model, records, options.work, with_emoji=with_emoji)
            results["ranks"][row] = collect_ranks(ridge)
            for direction in DIRECTIONS:
                for key, rate in chance_hit_at_k(getattr(ridge, direction).relevant).items():
                    results["chance"][f"{direction}/{key}"] = rate
        model_result = measure_retrieval(model.encode_document, model.encode_query, records=records)
        results["ranks"][name] = collect_ranks(model_result)
        results |= compare_rows(results["ranks"])
        write_text_atomically(options.to, json.dumps(results) + "\n")
        for key, interval in results["hit rates"][name].items():
            logger.info(
                f"{name} {key} {interval['mean']:.3f} {interval['low']:.3f}-{interval['high']:.3f}"
            )


if __name__ == "__main__":
    main()
