"""Captions that a model chooses by its own embedding, among its own drafts and known texts, against greedy ones.

    python experiments/nano/drafts.py runs/demo/model runs/demo/data/stamps/test.jsonl runs/demo/data/stamps/train-kept.jsonl

The last file holds the known texts: its captions. A sentence encoder judges: near is its cosine of a caption to the
reference, hit@k whether the reference is among the k nearest of all distinct references.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from _captions import nearness

from vlduet.data.formats import read_jsonl
from vlduet.demo.measure import MAX_CAPTION_TOKENS
from vlduet.eval.benchmarks.scores import average, paired_difference
from vlduet.logs import install_log_handler, logger
from vlduet.model.duet import DuetModel
from vlduet.workflows.captioning import known_texts

WAYS = {
    "greedy": (1, False),
    "4 drafts": (4, False),
    "8 drafts": (8, False),
    "8 drafts and known": (8, True),
}
"""Number of drafts, and whether the known texts are among them."""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("known", type=Path)
    options = parser.parse_args()
    install_log_handler()
    model = DuetModel.from_pretrained(options.model)
    pairs = [
        (r.image, r.short[0])
        for r in read_jsonl(options.records)
        if r.image is not None and r.short
    ]
    texts = list(dict.fromkeys(known_texts(options.known)))
    vectors = dict(zip(texts, model.encode_query(texts), strict=True))
    found: dict[str, dict[str, np.ndarray]] = {}
    for way, (drafts, known) in WAYS.items():
        captions = model.caption_images(
            [image for image, _ in pairs],
            max_new_tokens=MAX_CAPTION_TOKENS,
            batch_size=16,
            num_drafts=drafts,
            known=vectors if known else {},
        )
        near, rank = nearness(captions, [text for _, text in pairs])
        found[way] = {"near": near, **{f"hit@{k}": (rank <= k).astype(float) for k in (1, 5)}}
        logger.info(
            f"{way}: {sum(caption in vectors for caption in captions)} of {len(captions)} are known texts"
        )
        for name, values in found[way].items():
            gap = paired_difference(average(values), average(found["greedy"][name]), seed=0)
            assert gap is not None, "the same images"
            more = f"{gap.mean:+.1f} ({gap.low:+.1f} to {gap.high:+.1f})"
            logger.info(f"{way}, {name}: {100 * values.mean():.1f}, against greedy {more}")


if __name__ == "__main__":
    main()
