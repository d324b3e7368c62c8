"""Time a joint training step with 4, 9 and 16 tokens per image.

    vlduet model nano models/nano
    python experiments/nano/image_tokens.py --model models/nano

A step has 32 images, each with its caption, and the 32 captions as texts. Features are random and
cached, as those of a frozen vision tower are. The numbers of tokens are timed in turn, so that
other work on the machine slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from material import Source
from sequences import image_sequence, text_sequence

from vlduet.data.sequences import PreparedImage
from vlduet.logs import install_log_handler, logger
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.objectives.language import language_loss
from vlduet.recipes.contrast import compute_contrastive_loss

TOKEN_COUNTS = (4, 9, 16)
NUM_RECORDS = 32
CAPTION = "A small red boat on a blue lake."
PACKED_ROW_TOKENS = 64


def make_source(model: DuetModel, num_tokens: int) -> Source:
    """Return images of `num_tokens` tokens with random features in the cache of the model."""
    images = []
    for number in range(NUM_RECORDS):
        key = f"{num_tokens}-tokens-{number}"
        model.feature_cache.put(key, torch.randn(num_tokens, 2 * nano.NUM_FEATURES))
        images.append(PreparedImage({}, num_tokens, key))
    captions = [f"{number}. {CAPTION}" for number in range(NUM_RECORDS)]
    return Source(captions, images, torch.empty(0))


def time_step(model: DuetModel, source: Source) -> float:
    """Return the seconds of a forward and a backward pass with both losses."""
    sequences = []
    for row in range(NUM_RECORDS):
        sequences.append(image_sequence(model, source, row, with_caption=True))
        sequences.append(text_sequence(model, source, row))
    start = time.monotonic()
    readout = model(model.collate(sequences, pack_to=PACKED_ROW_TOKENS))
    loss = language_loss(readout.nll, global_token_count=len(readout.nll))
    contrastive = compute_contrastive_loss(readout, model.logit_scale, min_temperature=0.01)
    (loss + contrastive).backward()
    return time.monotonic() - start


def main() -> None:
    """Log the median seconds of a step for every number of tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    install_log_handler()
    torch.manual_seed(0)
    model = DuetModel.from_pretrained(options.model)
    model.feature_cache = FeatureCache(None)
    model.make_trainable(lora=nano.BASE_LORA, projector=True)
    model.train()
    sources = {count: make_source(model, count) for count in TOKEN_COUNTS}
    seconds: dict[int, list[float]] = {count: [] for count in TOKEN_COUNTS}
    for _ in range(options.repeats + 1):
        for count, source in sources.items():
            seconds[count].append(time_step(model, source))
    for count, values in seconds.items():
        median = statistics.median(values[1:])  # the first one allocates memory
        logger.info(f"{count} tokens per image: {median:.2f} s per step")


if __name__ == "__main__":
    main()
