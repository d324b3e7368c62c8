"""How sure Lite0's classifier must be, and how loud it may speak: validation without training, one row a pair of numbers.

    vlduet model nano models/nano && vlduet data fetch stamps --to data
    python experiments/nano/classes.py --model models/nano --data data

A vote of 0 is nano without classes. Nothing of the test split is read. What was chosen was written into the shipped part by

    python experiments/nano/classes.py --start EARLIER.safetensors --out src/vlduet/model/nano.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from base import classifier, earlier, reading_classes
from safetensors.torch import save_file

from vlduet.corpora import catalog
from vlduet.data.formats import read_jsonl
from vlduet.logs import install_log_handler, logger
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.workflows.validation import compute_validation_metrics, is_usable_pair

DOUBTS, VOTES = (5.0, 6.0, 7.0), (0.01, 0.02, 0.03, 0.04, 0.06)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--start", type=Path, help="nano.safetensors from before the classes")
    parser.add_argument("--out", type=Path, help="the same, reading them")
    options = parser.parse_args()
    install_log_handler()
    if options.start is not None and options.out is not None:
        save_file(earlier(options.start), options.out)
        return
    if options.model is None or options.data is None:
        parser.error("--model and --data are needed, or --start and --out")
    model = DuetModel.from_pretrained(options.model)
    folder = catalog.fetch_corpus("stamps", options.data).folder
    validation = [record for record in read_jsonl(folder / "val.jsonl") if is_usable_pair(record)]
    tower, first = model.backbone.model.model.vision_tower, model.backbone.projector.linear_1
    _, bias = classifier()
    for doubt, vote in (
        (nano.CLASS_LOGIT_THRESHOLD, 0.0),
        *((doubt, vote) for doubt in DOUBTS for vote in VOTES),
    ):
        with torch.no_grad():
            tower.encoder.blocks[17].projection.project_bn.bias[nano.CLASS_CHANNELS] = bias - doubt
            first.weight.copy_(reading_classes(first.weight, vote=vote))
        model.feature_cache = FeatureCache(None)  # another doubt, other features
        logger.info(
            f"doubt {doubt}, vote {vote}: {compute_validation_metrics(model, validation, seed=0)}"
        )


if __name__ == "__main__":
    main()
