"""Ranking the options of questions by likelihood: vlduet against plain transformers, on the same weights and tokens.

    vlduet                  DuetModel.nll: a question's pictures and words are read once, its options behind them
    vlduet, each option     the same batches with every option behind its own copy of the question
    transformers            batches of 16 in the order given, padded to the longest; `model(**inputs).logits` of the options'
                            tokens (`logits_to_keep`), cross entropy

All give the same numbers, and the largest difference is printed. What is timed begins with strings and image files.

    python benchmarks/likelihood.py [--quick] [--model DIR] [--data FILE]
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _bench
import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from vlduet.data import images
from vlduet.data.batches import FORWARD_MAX_TOKENS, group_by_length
from vlduet.data.records import ImageRef, Message, Parts, Record
from vlduet.data.sequences import IGNORE_INDEX, Sequence
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache

BATCH = 16

Pair = tuple[Parts, str]
"""A question and one of its options."""


def questions(
    records: list[Record], count: int, *, shown: int, options: int, rng: random.Random
) -> list[Pair]:
    """Pairs of `count` questions: some captioned pictures, then one more whose caption is among the options."""
    found: list[Pair] = []
    for _ in range(count):
        *told, asked = rng.sample(records, shown + 1)
        parts = [
            part for record in told for part in (record.image, f"This is: {record.short[0]}\n")
        ]
        prompt = (*parts, asked.image, "What is this?")
        captions = [
            asked.short[0],
            *(record.short[0] for record in rng.sample(records, options - 1)),
        ]
        found += [
            (tuple(part for part in prompt if part is not None), caption) for caption in captions
        ]
    return found


def rendered(model: DuetModel, pair: Pair) -> Sequence:
    prompt, option = pair
    return model.renderer.render_chat(
        (Message("user", prompt), Message("assistant", (option,))), add_generation_prompt=False
    )


def ours(model: DuetModel, pairs: list[Pair]) -> np.ndarray:
    model.feature_cache = FeatureCache(None)  # every repeat pays for the vision tower
    return np.array(
        [nats for nats, _ in model.compute_sequence_nll([rendered(model, pair) for pair in pairs])]
    )


def ours_each(model: DuetModel, pairs: list[Pair]) -> np.ndarray:
    model.feature_cache = FeatureCache(None)
    sequences = [rendered(model, pair) for pair in pairs]
    found = np.empty(len(pairs))
    for chosen in group_by_length([len(s) for s in sequences], FORWARD_MAX_TOKENS):
        with torch.no_grad():
            nll = model.eval()(model.collate([sequences[i] for i in chosen])).nll
        counts = [sum(label != IGNORE_INDEX for label in sequences[i].labels) for i in chosen]
        found[chosen] = [float(part.double().sum()) for part in nll.split(counts)]
    return found


class Plain:
    """What one writes without a library: the model, the image processor, a loop. The tokens are ours."""

    def __init__(self, folder: Path, model: DuetModel):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.ours = model

    @torch.no_grad()
    def __call__(self, pairs: list[Pair]) -> np.ndarray:
        found = []
        for begin in range(0, len(pairs), BATCH):
            sequences = [rendered(self.ours, pair) for pair in pairs[begin : begin + BATCH]]
            longest = max(map(len, sequences))
            ids, labels, mask = (
                torch.full((len(sequences), longest), fill) for fill in (0, IGNORE_INDEX, 0)
            )
            for n, sequence in enumerate(sequences):
                here = slice(
                    longest - len(sequence), None
                )  # padding left, so that the options end together
                ids[n, here] = torch.tensor(sequence.token_ids)
                labels[n, here] = torch.tensor(sequence.labels)
                mask[n, here] = 1
            pictures = [
                images.load_image(part)
                for prompt, _ in pairs[begin : begin + BATCH]
                for part in prompt
                if isinstance(part, ImageRef)
            ]
            pixels = self.processor(images=pictures, return_tensors="pt")
            kept = longest - int((labels != IGNORE_INDEX).any(0).nonzero()[0]) + 1
            logits = self.model(
                input_ids=ids, attention_mask=mask, logits_to_keep=kept, **pixels
            ).logits
            wanted = labels[:, -kept + 1 :]
            nll = F.cross_entropy(
                logits[:, :-1].mT, wanted, ignore_index=IGNORE_INDEX, reduction="none"
            )
            found.append(nll.double().sum(1))
        return torch.cat(found).numpy()


def main() -> None:
    options = _bench.arguments(__doc__).parse_args()
    folder = _bench.model_folder(options.model)
    records = _bench.pairs(options.data)
    _bench.facts(options, folder)
    model = DuetModel.from_pretrained(folder, device="cpu")
    plain = Plain(folder, model)
    rng = random.Random(options.seed)
    repeats = options.repeats or (1 if options.quick else 3)
    for title, shown, among in [
        ("a picture, 4 captions to choose from", 0, 4),
        ("seven pictures, 6 captions", 6, 6),
    ]:
        count = 4 if options.quick else (48 if not shown else 12)
        pairs = questions(records, count, shown=shown, options=among, rng=rng)
        contenders: dict[str, Callable[[], np.ndarray]] = {
            "vlduet": partial(ours, model, pairs),
            "vlduet, each option": partial(ours_each, model, pairs),
            "transformers": partial(plain, pairs),
        }
        found = {name: contender() for name, contender in contenders.items()}
        seconds = _bench.interleaved(contenders, repeats)
        _bench.table(
            f"{title}: {count} questions", "questions/s", seconds, work=count, ours="vlduet"
        )
        worst = ", ".join(
            f"{n} {np.abs(v - found['vlduet']).max():.0e}"
            for n, v in found.items()
            if n != "vlduet"
        )
        print(f"  largest difference to vlduet, in nats of an option: {worst}", flush=True)


if __name__ == "__main__":
    main()
