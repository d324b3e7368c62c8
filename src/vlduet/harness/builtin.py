"""A model's functions for the benchmarks: what `vlduet eval` plays them with, and what it says of who made a number."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlduet import __version__
from vlduet.corpora import catalog
from vlduet.data.batches import group_by_length
from vlduet.data.records import ImageRef, Message, Part, Parts
from vlduet.data.sequences import Sequence
from vlduet.encoders.dual import open_frozen_encoder
from vlduet.encoders.fluency import BartScorer
from vlduet.encoders.frozen import FrozenEncoder, fingerprint_encoder, get_modality
from vlduet.errors import ModelError, VLDuetError
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.tasks import Benchmark
from vlduet.eval.llm_grader import open_grader
from vlduet.eval.predictions import FluencyModel, ModelFunctions
from vlduet.eval.run import evaluate
from vlduet.logs import logger, track_progress
from vlduet.model.backbone import select_device
from vlduet.model.checkpoint import MANIFEST_NAME
from vlduet.model.duet import DuetModel
from vlduet.model.families.registry import FAMILIES
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.generation import continuous
from vlduet.model.processing import IMAGE_BACKEND, read_config

EmbedFunction = Callable[[list[Parts], bool], np.ndarray]
"""(items, whether they are queries) -> float32[N, E]."""

BATCH_TOKENS = 8192
"""Padded prompt tokens of one batch."""


@dataclass(frozen=True)
class GraderSettings:
    """Who reads the answers of LLaVA-Bench and MM-Vet."""

    url: str
    """An OpenAI-compatible address, as ``http://localhost:8000/v1``."""
    model: str | None = None
    """Default: the official judge of each benchmark."""
    key_file: Path | None = None
    """A file that holds the key."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What can be chosen for an evaluation."""

    seed: int = 0
    """Of intervals and of whatever a protocol draws."""
    system: str | None = None
    """A system message before every question; LLaVA-1.5's numbers were taken with one."""
    k: int | None = None
    """Facts that a RAG benchmark shows; None is each one's default."""
    retriever: Path | None = None
    """A second model, CLIP, SigLIP, a dual or a sentence encoder: the independent retriever of the RAG benchmarks."""
    fluency: Path | None = None
    """A BART checkpoint: WebQA's fluency and its QA number need one."""
    judge: GraderSettings | None = None


def open_model_functions(
    folder: Path, settings: EvaluationSettings
) -> tuple[ModelFunctions, dict[str, Any]]:
    """The functions of a model folder, and the facts about it. CLIP, SigLIP and dual encoders embed and do not speak.

    Raises:
        ModelError: as `DuetModel.from_pretrained` and `open_encoder` do.
    """
    if not can_generate(folder):
        playing = ModelFunctions(
            embed=open_two_tower_embedder(folder),
            generate=unsupported(folder),
            continuation_nll=unsupported(folder),
            retriever_embed=_other(settings),
            grade=open_settings_grader(settings),
            fluency_model=open_fluency_model(settings),
        )
        return playing, {
            "fingerprint": open_settings_encoder(folder).fingerprint,
            "image_backend": IMAGE_BACKEND,
        }
    model = DuetModel.from_pretrained(folder)
    facts = {
        "fingerprint": model.fingerprint,
        **model.embedding_settings(),
        "dtype": str(model.backbone.model.dtype).removeprefix("torch."),
        "image_backend": model.image_backend,
    }
    return model_functions(model, settings), facts


def model_functions(model: DuetModel, settings: EvaluationSettings) -> ModelFunctions:
    """Everything that a model can do. The retriever, if one is set, is opened when it is first asked."""
    room_for_many_images(model)
    return ModelFunctions(
        embed=lambda items, query: model.encode(items, is_query=query),
        generate=lambda prompts, longest: generate_answers(
            model, prompts, longest, system=settings.system
        ),
        continuation_nll=lambda pairs: answer_nlls(model, pairs, system=settings.system),
        retriever_embed=_other(settings),
        grade=open_settings_grader(settings),
        fluency_model=open_fluency_model(settings),
    )


def room_for_many_images(model: DuetModel) -> None:
    """Let prompts be as long as the language model can read: DEMON's have up to ten images."""
    model.renderer = model.renderer.with_options(max_tokens=max(model.renderer.max_tokens, model.backbone.context_length or 0))


def can_generate(folder: Path) -> bool:
    """Whether a folder holds a model that generates: one that VLDuet saved, or a checkpoint of a known family."""
    return (folder / MANIFEST_NAME).is_file() or (
        (folder / "config.json").is_file() and read_config(folder).get("model_type") in FAMILIES
    )


def open_settings_encoder(folder: Path) -> FrozenEncoder:
    """A folder's encoder; its weights are read when they are needed."""
    return open_frozen_encoder(folder, cache=FeatureCache(None), device=select_device())


def open_two_tower_embedder(folder: Path) -> EmbedFunction:
    """A CLIP, SigLIP or dual encoder as (items, whether they are queries) -> float32[N, E]; see `reader`.

    Raises:
        ModelError: the folder's encoder does not read both images and texts.
    """
    encoder = open_settings_encoder(folder)
    if set(encoder.modalities) != {"image", "text"}:
        fix = "Name a model of VLDuet, a checkpoint that it opens, CLIP, SigLIP or a dual encoder"
        raise ModelError(f"reads {' and '.join(encoder.modalities)}s alone", place=folder, fix=fix)
    return as_embedder(encoder)


def as_embedder(encoder: FrozenEncoder) -> EmbedFunction:
    """A frozen encoder as (items, whether they are queries) -> float32[N, E].

    A mixture is the mean of the unit vectors of the parts that the encoder reads; an item without any is NaN.
    """

    def embed(items: list[Parts], query: bool) -> np.ndarray:
        parts = list(dict.fromkeys(part for item in items for part in item))
        vectors: dict[Part, torch.Tensor] = {}
        for kind in encoder.modalities:
            wanted = [part for part in parts if get_modality(part) == kind]
            if wanted:
                found = torch.nn.functional.normalize(
                    encoder.encode_functions[kind](wanted).detach().float().cpu(), dim=1
                )
                vectors |= dict(zip(wanted, found, strict=True))
        means = []
        for item in items:
            read = [vectors[part] for part in item if part in vectors]
            means.append(
                torch.stack(read).mean(0) if read else torch.full((encoder.dim,), torch.nan)
            )
        made: np.ndarray = torch.nn.functional.normalize(torch.stack(means), dim=1).numpy()
        return made

    return embed


def unsupported(folder: Path) -> Callable[..., Any]:
    """What an encoder answers: a ModelError that says that it does not generate."""

    def refuse(*_: Any) -> Any:
        what = "this model embeds images and texts and does not generate, so it has no number here"
        raise ModelError(
            what, place=folder, fix="Evaluate it on benchmarks of the protocols retrieval and pairs"
        )

    return refuse


def open_settings_grader(
    settings: EvaluationSettings,
) -> Callable[[Mapping[str, Any], str, float], str] | None:
    """The judge's function; None without one."""
    judge = settings.judge
    return (
        None
        if judge is None
        else open_grader(judge.url, model=judge.model, key_file=judge.key_file)
    )


def open_fluency_model(settings: EvaluationSettings) -> FluencyModel | None:
    """The reader of WebQA's answers, opened when it is first asked; None without one."""
    folder = settings.fluency
    if folder is None:
        return None
    opening = cache(BartScorer)

    def nats(pairs: Many[tuple[str, str]]) -> list[float]:
        return opening(folder)(pairs)

    return FluencyModel(f"{folder.name} {fingerprint_encoder(folder)}", nats)


def _other(settings: EvaluationSettings) -> EmbedFunction | None:
    """The independent retriever, opened when it is first asked."""
    folder = settings.retriever
    if folder is None:
        return None

    @cache
    def retriever() -> EmbedFunction:
        if not can_generate(folder):
            return as_embedder(open_settings_encoder(folder))
        model = DuetModel.from_pretrained(folder)
        return lambda items, query: model.encode(items, is_query=query)

    def embed(items: list[Parts], query: bool) -> np.ndarray:
        return retriever()(items, query)

    return embed


def chat_messages(prompt: Parts, *, system: str | None) -> tuple[Message, ...]:
    """One user turn, after a system turn where there is one."""
    before = (Message("system", (system,)),) if system else ()
    return (*before, Message("user", prompt))


def is_single_image(prompt: Parts) -> bool:
    """Whether a prompt is an image and nothing else."""
    return len(prompt) == 1 and isinstance(prompt[0], ImageRef)


def generate_answers(
    model: DuetModel, prompts: Many[Parts], longest: int, *, system: str | None = None
) -> list[str]:
    """Greedy answers of at most `longest` tokens, in the order of the prompts, batched by length.

    An image alone asks for a caption in the way that the model was trained to write them.
    """
    sequences = [
        model.renderer.render_embedding(prompt)
        if is_single_image(prompt)
        else model.renderer.render_chat(
            chat_messages(prompt, system=system), add_generation_prompt=True
        )
        for prompt in prompts
    ]
    found = [""] * len(prompts)
    for chosen in group_by_length([len(s) for s in sequences], BATCH_TOKENS):
        start = model.prefill_inputs([sequences[i] for i in chosen])
        for i, text in zip(
            chosen, continuous.generate_texts(model.backbone, start, longest), strict=True
        ):
            found[i] = text
    return found


def answer_nlls(
    model: DuetModel, pairs: Many[tuple[Parts, str]], *, system: str | None = None
) -> list[tuple[float, int]]:
    """(nats, tokens) of each continuation as the answer to its prompt, its end of turn included.

    After an image alone, the continuation is read as its caption.
    """

    def sequence(prompt: Parts, text: str) -> Sequence:
        if is_single_image(prompt):
            assert isinstance(prompt[0], ImageRef)
            return model.renderer.render_caption(prompt[0], text)
        turns = (*chat_messages(prompt, system=system), Message("assistant", (text,)))
        return model.renderer.render_chat(turns, add_generation_prompt=False)

    return model.compute_sequence_nll([sequence(prompt, text) for prompt, text in pairs])


def describe_provenance(
    folder: Path, facts: Mapping[str, Any], settings: EvaluationSettings
) -> dict[str, Any]:
    """What made the predictions: another value of any of these is another run."""
    other, judge = settings.retriever, settings.judge
    return {
        "model": folder.name,
        **facts,
        "system": settings.system,
        "retriever": None if other is None else other.name,
        "judge": None if judge is None else judge.model or "the official one",
        "python": platform.python_version(),
        "vlduet": __version__,
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def evaluate_model(
    folder: Path,
    benchmarks: Many[Benchmark],
    *,
    data: Path,
    runs: Path,
    settings: EvaluationSettings,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Evaluate one model on several benchmarks; what one of them lacks does not cost the others.

    Returns:
        The scores, and for every benchmark that could not run the reason.
    """
    playing, facts = open_model_functions(folder, settings)
    maker = describe_provenance(folder.resolve(), facts, settings)
    done, failed = [], {}
    for benchmark in benchmarks:
        logger.info(f"{benchmark.name}: {benchmark.title}")
        source = Source(data, seed=settings.seed, k=settings.k)
        try:
            for corpus in benchmark.corpora:
                catalog.fetch_corpus(corpus, data / "corpora")
            done.append(
                evaluate(
                    benchmark,
                    playing,
                    source=source,
                    runs=runs,
                    provenance=maker,
                    progress=with_progress_bar,
                )
            )
        except VLDuetError as error:
            failed[benchmark.name] = str(error)
            logger.info(f"{benchmark.name} is left out: {error}")
    return done, failed


def with_progress_bar(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A progress bar over a loop."""
    return track_progress(items, label=label)
