"""Compare thresholds and weights of the class channels on the validation split, without training.

    vlduet model nano models/nano && vlduet data fetch stamps --to data
    python experiments/nano/classes.py --model models/nano --data data

The threshold says how sure EfficientNet-Lite0's classifier must be, the weight how much its class
counts in the projector. A weight of 0 is nano without classes. Nothing of the test split is read.
The chosen values were written into the shipped part by

    python experiments/nano/classes.py --start EARLIER.safetensors --out nano.safetensors
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from base import load_earlier_run
from material import add_class_columns, load_classifier
from safetensors.torch import save_file

from vlduet.corpora import catalog
from vlduet.data.formats import read_jsonl
from vlduet.logs import install_log_handler, logger
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.workflows.validation import compute_validation_metrics, is_usable_pair

THRESHOLDS = (5.0, 6.0, 7.0)
WEIGHTS = (0.01, 0.02, 0.03, 0.04, 0.06)


def main() -> None:
    """Log the validation metrics of every pair of values, or convert an earlier file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--start", type=Path, help="nano.safetensors from before the classes")
    parser.add_argument("--out", type=Path, help="file to write with the classes added")
    options = parser.parse_args()
    install_log_handler()
    if options.start is not None and options.out is not None:
        save_file(load_earlier_run(options.start), options.out)
        return
    if options.model is None or options.data is None:
        parser.error("--model and --data are needed, or --start and --out")
    model = DuetModel.from_pretrained(options.model)
    folder = catalog.fetch_corpus("stamps", options.data).folder
    validation = [record for record in read_jsonl(folder / "val.jsonl") if is_usable_pair(record)]
    vision_tower = model.backbone.model.model.vision_tower
    first_layer = model.backbone.projector.linear_1
    class_bias = vision_tower.encoder.blocks[17].projection.project_bn.bias
    _, bias = load_classifier()
    without_classes = (nano.CLASS_LOGIT_THRESHOLD, 0.0)
    for threshold, weight in (without_classes, *itertools.product(THRESHOLDS, WEIGHTS)):
        with torch.no_grad():
            class_bias[nano.CLASS_CHANNELS] = bias - threshold
            first_layer.weight.copy_(add_class_columns(first_layer.weight, weight=weight))
        model.feature_cache = FeatureCache(None)  # the features depend on the threshold
        metrics = compute_validation_metrics(model, validation, seed=0)
        logger.info(f"threshold {threshold}, weight {weight}: {metrics}")


if __name__ == "__main__":
    main()
