"""Test whether `p` of unrelated pairs is uniform on records that did not calibrate the model.

Statistics of scores are measured on the records of one file, as a training run does with its
validation records, and `p` is computed for all unrelated pairs of another file. If both files are
samples of the same records, a share p of these pairs has at most p. Printed is a Markdown table: by
types of query and document, the share of pairs with p up to .5, .1 and .01, and the largest
difference between the distribution of p and the uniform one (the statistic of Kolmogorov and
Smirnov).

    python experiments/calibration/uniformity.py MODEL VALIDATION.jsonl HELD_OUT.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vlduet.data.sources import as_source
from vlduet.encoders.dual import open_embedder
from vlduet.retrieval.calibration import (
    measure_score_statistics,
    sample_records,
    score_unrelated_pairs,
)

LEVELS = (0.5, 0.1, 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("held_out", type=Path)
    options = parser.parse_args()
    model = open_embedder(options.model)
    statistics = measure_score_statistics(
        model, sample_records(as_source(options.validation).read())
    )
    if statistics is None:
        raise SystemExit("The validation records have no unrelated pairs.")
    held_out = sample_records(as_source(options.held_out).read())
    print(
        "| query | document | pairs calibrated | pairs | p <= .5 | p <= .1 | p <= .01 | largest |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for key, scores in score_unrelated_pairs(model, held_out).items():
        distribution = statistics.distributions[key]
        shares = np.sort([distribution.share_at_least(float(score)) for score in scores])
        uniform = np.arange(1, len(shares) + 1) / len(shares)
        cells = [f"{(shares <= level).mean():.3f}" for level in LEVELS]
        largest = np.abs(shares - uniform).max()
        counts = f"{distribution.num_pairs:,} | {len(shares):,}"
        print(f"| {key[0]} | {key[1]} | {counts} | {' | '.join(cells)} | {largest:.3f} |")


if __name__ == "__main__":
    main()
