"""Rank the options of questions by likelihood: vlduet against plain transformers, same weights.

    vlduet                  DuetModel.compute_sequence_nll: the images and the text of a question
                            are read once, its options follow as branches
    vlduet, each option     the same batches; every option follows its own copy of the question
    transformers            batches of 16 in the given order, padded to the longest; cross entropy
                            of `model(**inputs).logits` of the options' tokens (`logits_to_keep`)

All give the same numbers; the largest difference is printed. The time includes tokenization and
decoding of image files.

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

BATCH_SIZE = 16
WORKLOADS = (
    ("a picture, 4 captions to choose from", 0, 4, 48),
    ("seven pictures, 6 captions", 6, 6, 12),
)
"""Title, number of example images, number of options, number of questions in a full run."""

QuestionOption = tuple[Parts, str]
"""A question and one of its options."""


def create_options(
    records: list[Record],
    num_questions: int,
    *,
    num_examples: int,
    num_options: int,
    rng: random.Random,
) -> list[QuestionOption]:
    """Return all options of all questions.

    A question shows some captioned images, then one more whose caption is among the options.
    """
    pairs: list[QuestionOption] = []
    for _ in range(num_questions):
        *examples, target = rng.sample(records, num_examples + 1)
        assert target.image is not None
        prompt: list[str | ImageRef] = []
        for example in examples:
            assert example.image is not None
            prompt += [example.image, f"This is: {example.short[0]}\n"]
        prompt += [target.image, "What is this?"]
        distractors = rng.sample(records, num_options - 1)
        captions = [record.short[0] for record in (target, *distractors)]
        pairs += [(tuple(prompt), caption) for caption in captions]
    return pairs


def render(model: DuetModel, pair: QuestionOption) -> Sequence:
    """Return the conversation in which the option is the answer, as tokens."""
    prompt, option = pair
    messages = (Message("user", prompt), Message("assistant", (option,)))
    return model.renderer.render_chat(messages, add_generation_prompt=False)


def score_with_shared_prefixes(model: DuetModel, pairs: list[QuestionOption]) -> np.ndarray:
    """Return the negative log likelihood of each option in nats, float64[options]."""
    model.feature_cache = FeatureCache(None)  # every repeat pays for the vision tower
    sequences = [render(model, pair) for pair in pairs]
    return np.array([nats for nats, _ in model.compute_sequence_nll(sequences)])


def score_each_option(model: DuetModel, pairs: list[QuestionOption]) -> np.ndarray:
    """Return the same with a copy of the question before every option."""
    model.feature_cache = FeatureCache(None)
    model.eval()
    sequences = [render(model, pair) for pair in pairs]
    nats = np.empty(len(pairs))
    for indices in group_by_length([len(s) for s in sequences], FORWARD_MAX_TOKENS):
        chosen = [sequences[i] for i in indices]
        with torch.no_grad():
            nll = model(model.collate(chosen)).nll
        counts = [int((torch.tensor(s.labels) != IGNORE_INDEX).sum()) for s in chosen]
        nats[indices] = [float(part.double().sum()) for part in nll.split(counts)]
    return nats


class PlainScorer:
    """A loop as one would write it without a library; only the token ids come from vlduet."""

    def __init__(self, folder: Path, duet: DuetModel):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.duet = duet

    @torch.no_grad()
    def score(self, pairs: list[QuestionOption]) -> np.ndarray:
        """Return the negative log likelihood of each option in nats, float64[options]."""
        scores = []
        for begin in range(0, len(pairs), BATCH_SIZE):
            scores.append(self._score_batch(pairs[begin : begin + BATCH_SIZE]))
        return torch.cat(scores).numpy()

    def _score_batch(self, pairs: list[QuestionOption]) -> torch.Tensor:
        sequences = [render(self.duet, pair) for pair in pairs]
        shape = (len(pairs), max(len(sequence) for sequence in sequences))
        token_ids = torch.zeros(shape, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, sequence in enumerate(sequences):
            begin = shape[1] - len(sequence)  # left padding, so that the options end together
            token_ids[row, begin:] = torch.tensor(sequence.token_ids)
            labels[row, begin:] = torch.tensor(sequence.labels)
            attention_mask[row, begin:] = 1
        pictures = [
            images.load_image(part)
            for prompt, _ in pairs
            for part in prompt
            if isinstance(part, ImageRef)
        ]
        pixels = self.image_processor(images=pictures, return_tensors="pt")
        first_label = int((labels != IGNORE_INDEX).any(0).nonzero()[0])
        num_logits = shape[1] - first_label + 1
        logits = self.model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            logits_to_keep=num_logits,
            **pixels,
        ).logits
        nll = F.cross_entropy(
            logits[:, :-1].mT,
            labels[:, first_label:],
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
        return nll.double().sum(1)


def main() -> None:
    options = _bench.build_parser(__doc__).parse_args()
    folder = _bench.find_model_folder(options.model)
    records = _bench.load_pairs(options.data)
    _bench.print_environment(options, folder)
    model = DuetModel.from_pretrained(folder, device="cpu")
    plain = PlainScorer(folder, model)
    rng = random.Random(options.seed)
    repeats = options.repeats or (1 if options.quick else 3)
    for title, num_examples, num_options, num_full in WORKLOADS:
        num_questions = 4 if options.quick else num_full
        pairs = create_options(
            records,
            num_questions,
            num_examples=num_examples,
            num_options=num_options,
            rng=rng,
        )
        contenders: dict[str, Callable[[], np.ndarray]] = {
            "vlduet": partial(score_with_shared_prefixes, model, pairs),
            "vlduet, each option": partial(score_each_option, model, pairs),
            "transformers": partial(plain.score, pairs),
        }
        scores = {name: contender() for name, contender in contenders.items()}
        seconds = _bench.time_in_turns(contenders, repeats)
        _bench.print_ratios(
            f"{title}: {num_questions} questions",
            "questions/s",
            seconds,
            work=num_questions,
            reference="vlduet",
        )
        reference = scores.pop("vlduet")
        differences = [
            f"{name} {np.abs(nats - reference).max():.0e}" for name, nats in scores.items()
        ]
        print(
            f"  largest difference to vlduet, in nats of an option: {', '.join(differences)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
