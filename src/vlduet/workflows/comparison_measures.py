"""Measurements of the trained models of a comparison, item by item, and their paired differences.

1. measure     validation pairs, and answers to questions without an image, by the model itself
2. benchmarks  by a function of the caller
3. compare     a run with the reference: the same items are drawn again on both sides

What was measured is stored beside each model, and read from there the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlduet.config import RunConfig
from vlduet.data.records import Record
from vlduet.encoders.dual import DualEncoder, open_embedder
from vlduet.eval import protocols
from vlduet.eval.benchmarks.scores import (
    BenchmarkScore,
    MetricSample,
    average,
    average_per_token,
    combine_samples,
    paired_difference,
)
from vlduet.eval.comparison import read_run_scores
from vlduet.eval.run import SAMPLES_FILE, read_samples, write_samples
from vlduet.files import write_atomically
from vlduet.logs import logger
from vlduet.model.duet import DuetModel
from vlduet.model.likelihood import compute_answer_nll
from vlduet.workflows.validation import (
    measure_retrieval,
    read_validation_pairs,
    select_captions,
)

HIT_CUTOFFS = (1, 10)
"""Values of k of the hit rates that are compared."""
MEASURES_FOLDER = "measures"
"""Folder in the folder of a run, with samples.npz and the results of benchmarks."""


@dataclass(frozen=True, slots=True)
class ComparisonMeasures:
    """Measurements of the models of a comparison beside their validation metrics."""

    questions: Sequence[tuple[str, str]]
    """Questions without an image, and their answers."""
    run_benchmarks: Callable[[Path, Path], None]
    """Measures the model of a folder on all benchmarks; writes their scores into another folder."""

    def measure(self, run: RunConfig) -> dict[str, MetricSample]:
        """Return all measurements of the trained model of a run, by name.

        Those of `measure_model`, and ``BENCHMARK NUMBER`` for the first number of each benchmark.
        What is not stored in the run's folder yet is computed, and stored there. A benchmark that
        failed is left out. Raises as `read_validation_pairs`, and if the model cannot be opened.
        """
        folder = run.out / MEASURES_FOLDER
        samples = read_samples(folder)
        if not samples:
            logger.info(f"measuring {run.out}")
            # Seed 0 for all, as in validation: the same wrong image for each caption.
            score = measure_model(
                open_embedder(run.out / "model"),
                read_validation_pairs(run),
                questions=self.questions,
                seed=0,
            )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / SAMPLES_FILE, lambda out: write_samples(out, score))
            samples = dict(score.samples)
        self.run_benchmarks(run.out / "model", folder)
        if any(folder.glob("*/scores.json")):
            for benchmark, numbers in read_run_scores(folder).samples.items():
                for name in list(numbers)[:1]:
                    samples[f"{benchmark} {name}"] = numbers[name]
        return samples


def measure_model(
    model: DuetModel | DualEncoder,
    records: Sequence[Record],
    *,
    questions: Sequence[tuple[str, str]],
    seed: int,
) -> BenchmarkScore:
    """Return the measurements of a model, item by item. The model's mode is restored.

    Args:
        model: any; a dual encoder has hit rates alone.
        records: pairs with an image and a short caption.
        questions: questions without an image, and their answers.
        seed: seed of the choice of the wrong image for each caption.

    Returns:
        ``text_to_image/hit@K`` and ``image_to_text/hit@K`` for K of `HIT_CUTOFFS`, as fractions;
        and in nats per token ``caption``, ``caption, wrong image`` (of the long caption, else the
        first short one) and ``chat``.

    Raises:
        DataError: as `vlduet.workflows.validation.compute_validation_metrics`.
        ConfigError: there are questions, and the model has no chat template.
    """
    retrieval = measure_retrieval(model, records)
    samples = {}
    for name in ("text_to_image", "image_to_text"):
        direction: protocols.RetrievalDirection = getattr(retrieval, name)
        for k in HIT_CUTOFFS:
            samples[f"{name}/hit@{k}"] = average(direction.hit_values(k), scale=1.0)
    if isinstance(model, DualEncoder):  # it cannot generate
        return BenchmarkScore(samples)
    entropy = protocols.measure_caption_cross_entropy(
        model.compute_caption_nll, select_captions(records), seed=seed
    )
    samples["caption"] = average_per_token(entropy.total_nats_right_image, entropy.num_tokens)
    samples["caption, wrong image"] = average_per_token(
        entropy.total_nats_wrong_image, entropy.num_tokens
    )
    if questions:
        totals, counts = zip(*compute_answer_nll(model, questions), strict=True)
        samples["chat"] = average_per_token(totals, counts)
    return BenchmarkScore(samples)


def compare_with_reference(
    measures: Mapping[str, Sequence[Mapping[str, MetricSample]]], *, reference: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the reference minus every other run, with paired 95 % intervals.

    Args:
        measures: name of a run -> the measurements of its seeds, in one order. The items of all
            seeds are drawn again within their seed.
        reference: name of a run.

    Returns:
        Name of the other run -> measurement -> ``mean``, ``low``, ``high`` and ``n``. Measurements
        that a run lacks, or has for other items, are left out.
    """
    differences: dict[str, dict[str, dict[str, float]]] = {}
    for name, seeds in measures.items():
        if name == reference:
            continue
        differences[name] = {}
        for metric in measures[reference][0]:
            rows = [*measures[reference], *seeds]
            if not all(metric in row for row in rows):
                continue
            ours = combine_samples([row[metric] for row in measures[reference]])
            theirs = combine_samples([row[metric] for row in seeds])
            difference = paired_difference(ours, theirs)
            if difference is not None:
                differences[name][metric] = asdict(difference)
    return differences
