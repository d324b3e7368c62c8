"""Captions that a model chooses among its own drafts by its own embedding, against greedy ones.

    python studies/nano/drafts.py runs/demo/model runs/demo/data/stamps/test.jsonl

A sentence encoder judges: near is its cosine of a caption to the reference, hit@k whether the reference is among the k
nearest of all distinct references.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from _captions import nearness

from vlduet.data.records import read_jsonl
from vlduet.demo.measure import CAPTION_TOKENS
from vlduet.eval.benchmarks.tasks import difference, sample
from vlduet.logs import say
from vlduet.model.duet import DuetModel

DRAFTS = (1, 4, 8)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("records", type=Path)
    options = parser.parse_args()
    model = DuetModel.from_pretrained(options.model)
    pairs = [(r.image, r.short[0]) for r in read_jsonl(options.records) if r.image is not None and r.short]
    found: dict[int, dict[str, np.ndarray]] = {}
    for drafts in DRAFTS:
        captions = model.caption([image for image, _ in pairs], max_new_tokens=CAPTION_TOKENS, batch=16, drafts=drafts)
        near, rank = nearness(captions, [text for _, text in pairs])
        found[drafts] = {"near": near, **{f"hit@{k}": (rank <= k).astype(float) for k in (1, 5)}}
        for name, values in found[drafts].items():
            gap = difference(sample(values), sample(found[1][name]), seed=0)
            assert gap is not None, "the same images"
            more = f"{gap.mean:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})"
            say(f"{drafts} drafts, {name}: {100 * values.mean():.1f}, against greedy {more}")


if __name__ == "__main__":
    main()
