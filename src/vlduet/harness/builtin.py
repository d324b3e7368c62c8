"""Functions of our models for the benchmark runners, and the evaluation behind `vlduet eval`.

The runners (`vlduet.eval.benchmarks`) know no model. `open_model_functions` opens a folder and
returns what they need; `evaluate_model` runs them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from vlduet import __version__
from vlduet.corpora import catalog
from vlduet.data.batches import group_by_length
from vlduet.data.records import ImageRef, Message, Part, Parts
from vlduet.data.sequences import Sequence as TokenSequence
from vlduet.encoders.dual import open_frozen_encoder
from vlduet.encoders.fluency import BartScorer
from vlduet.encoders.frozen import FrozenEncoder, get_modality
from vlduet.encoders.loading import fingerprint_encoder
from vlduet.errors import ModelError, VLDuetError
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.tasks import Benchmark
from vlduet.eval.llm_grader import open_grader
from vlduet.eval.predictions import EmbedFunction, FluencyModel, GradeFunction, ModelFunctions
from vlduet.eval.run import evaluate
from vlduet.hub import resolve_model
from vlduet.logs import logger, track_progress
from vlduet.model.backbone import select_device
from vlduet.model.checkpoint import MANIFEST_NAME, read_provenance
from vlduet.model.duet import DuetModel
from vlduet.model.families.registry import FAMILIES
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.generation import offline
from vlduet.model.limits import log_first_truncation, log_truncation
from vlduet.model.processing import IMAGE_BACKEND, read_config
from vlduet.model.saving import find_published_model

BATCH_TOKENS = 8192
"""Number of padded prompt tokens in one batch of generation."""


UNIMPORTANT_SETTINGS = {
    "data": ("cache", "cache_limit", "validation"),
    "train": ("log_every", "eval_every", "save_every"),
}
"""Settings of training by section that do not decide the weights."""


@dataclass(frozen=True)
class GraderSettings:
    """LLM grader of LLaVA-Bench and MM-Vet."""

    url: str
    """OpenAI-compatible address, such as ``http://localhost:8000/v1``."""
    model: str | None = None
    """Name of the grader; None is the official one of each benchmark."""
    key_file: Path | None = None
    """File with the API key, if the server needs one."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation, the keys of ``--set``."""

    seed: int = 0
    """Seed of the intervals and of random choices in protocols."""
    system: str | None = None
    """System message before every question; LLaVA-1.5's numbers were measured with one."""
    k: int | None = None
    """Number of knowledge entries in a RAG prompt; None is each benchmark's default."""
    retriever: Path | None = None
    """Independent retriever of the RAG benchmarks: CLIP, SigLIP, a dual or sentence encoder."""
    fluency: Path | None = None
    """BART checkpoint for WebQA's fluency and its QA number."""
    judge: GraderSettings | None = None


# ------------------------------------------------------------------ functions of a model


def open_model_functions(
    folder: Path, settings: EvaluationSettings
) -> tuple[ModelFunctions, dict[str, Any]]:
    """Open a model folder; return its functions, and the facts that identify it.

    CLIP, SigLIP and dual encoders embed; their functions for generation raise ModelError, and their
    weights are read at the first call. A generating model is read at once.

    Returns:
        The functions, with those of the helpers that the settings name (see `model_functions`).
        ``fingerprint`` and ``image_backend``; of a generating model also its embedding settings,
        ``dtype`` and what `read_training` returns.

    Raises:
        ModelError: the folder has no model that can be opened, or one that reads only images or
            only texts.
        ConfigError: the grader's address or key file is not usable.
    """
    folder = resolve_model(folder)
    if can_generate(folder):
        model = DuetModel.from_pretrained(folder)
        facts = {
            "fingerprint": model.fingerprint,
            **model.embedding_settings(),
            "dtype": str(model.backbone.model.dtype).removeprefix("torch."),
            "image_backend": model.image_backend,
            **read_training(folder),
        }
        return model_functions(model, settings), facts
    functions = ModelFunctions(
        embed=open_two_tower_embedder(folder),
        generate=unsupported(folder),
        continuation_nll=unsupported(folder),
        retriever_embed=_open_retriever(settings.retriever),
        grade=open_settings_grader(settings),
        fluency_model=open_fluency_model(settings),
    )
    fingerprint = _open_encoder(folder).fingerprint
    return functions, {"fingerprint": fingerprint, "image_backend": IMAGE_BACKEND}


def read_training(folder: Path) -> dict[str, Any]:
    """Return how the model in a folder was trained, as `vlduet.eval.paper_rows.Training` reads it.

    The result is ``{"training": {"config", "options", "steps", "records"}}``, or {} for a
    checkpoint and for a model whose manifest does not say it. In the config, what does not decide
    the weights is left out: the folder of the run, caches, validation and intervals.

    Raises ModelError as `read_provenance` does.
    """
    provenance = read_provenance(folder)
    if not provenance.keys() >= {"config", "steps", "records"}:
        return {}
    config = {key: value for key, value in provenance["config"].items() if key != "out"}
    for section, names in UNIMPORTANT_SETTINGS.items():
        config[section] = {k: v for k, v in config[section].items() if k not in names}
    facts = {key: provenance[key] for key in ("steps", "records")}
    # Models of earlier versions have no list of all options.
    return {"training": {"config": config, "options": provenance.get("options", {}), **facts}}


def model_functions(model: DuetModel, settings: EvaluationSettings) -> ModelFunctions:
    """Return everything that a model and the helpers of the settings can do.

    Prompts may be as long as the language model's context, because some benchmarks have ten images
    per prompt. Answers are greedy; errors are those of `DuetModel.encode`, `generate_answers` and
    `answer_nlls`. Retriever, grader and fluency model are None where the settings name none; the
    weights of retriever and fluency model are read at their first call.

    Raises:
        ConfigError, ModelError, FileNotFoundError: as `open_settings_grader` and
            `open_fluency_model`.
    """
    max_tokens = max(model.renderer.max_tokens, model.backbone.context_length or 0)

    def embed(items: list[Parts], is_query: bool) -> np.ndarray:
        with log_truncation("benchmark") as on_truncate:
            return model.encode(
                items, is_query=is_query, max_tokens=max_tokens, on_truncate=on_truncate
            )

    def generate(prompts: list[Parts], max_new_tokens: int) -> list[str]:
        return generate_answers(
            model, prompts, max_new_tokens, system=settings.system, max_tokens=max_tokens
        )

    def continuation_nll(pairs: list[tuple[Parts, str]]) -> list[tuple[float, int]]:
        return answer_nlls(model, pairs, system=settings.system, max_tokens=max_tokens)

    return ModelFunctions(
        embed=embed,
        generate=generate,
        continuation_nll=continuation_nll,
        retriever_embed=_open_retriever(settings.retriever),
        grade=open_settings_grader(settings),
        fluency_model=open_fluency_model(settings),
    )


def can_generate(folder: Path) -> bool:
    """Return whether a folder has a generating model.

    That is a model that VLDuet saved, or a checkpoint of a known family, perhaps of a published
    embedding model.
    """
    if (folder / MANIFEST_NAME).is_file():
        return True
    if not (folder / "config.json").is_file():
        return find_published_model(folder) is not None
    return read_config(folder, ignores_code=True).get("model_type") in FAMILIES


def unsupported(folder: Path) -> Callable[..., Any]:
    """Return a function that raises ModelError: the encoder in `folder` does not generate."""

    def refuse(*_: Any) -> Any:
        raise ModelError(
            "this model embeds images and texts and does not generate, so it has no number here",
            place=folder,
            fix="Evaluate it on benchmarks of the protocols retrieval and pairs",
        )

    return refuse


# ------------------------------------------------------------------ encoders as embedders


def open_two_tower_embedder(folder: Path) -> EmbedFunction:
    """Open a CLIP, SigLIP or dual encoder as an embedding function (see `as_embedder`).

    Raises:
        ModelError: the encoder does not read both images and texts.
    """
    encoder = _open_encoder(folder)
    if set(encoder.modalities) != {"image", "text"}:
        raise ModelError(
            f"reads {' and '.join(encoder.modalities)}s alone",
            place=folder,
            fix="Name a model of VLDuet, a known checkpoint, CLIP, SigLIP or a dual encoder",
        )
    return as_embedder(encoder)


def as_embedder(encoder: FrozenEncoder) -> EmbedFunction:
    """Return a function (items, whether they are queries) -> unit vectors float32[N, E].

    The vector of an item with several parts is the normalised mean of the unit vectors of those
    parts that the encoder reads. An item without such a part gives NaN. Whether items are queries
    makes no difference. The weights are read at the first call, which may raise ModelError; an
    image that cannot be read raises ImageError, and no items raise RuntimeError.
    """

    def embed(items: list[Parts], is_query: bool) -> np.ndarray:
        """Return unit vectors float32[N, E] as `as_embedder` says; `is_query` is not used."""
        distinct_parts: dict[Part, None] = {}
        for item in items:
            distinct_parts |= dict.fromkeys(item)
        part_vectors: dict[Part, torch.Tensor] = {}
        for modality in encoder.modalities:
            parts = [part for part in distinct_parts if get_modality(part) == modality]
            if parts:
                vectors = encoder.encode_functions[modality](parts).detach().float().cpu()
                part_vectors |= dict(zip(parts, normalize(vectors, dim=1), strict=True))
        means = []
        for item in items:
            vectors_of_item = [part_vectors[part] for part in item if part in part_vectors]
            if vectors_of_item:
                means.append(torch.stack(vectors_of_item).mean(0))
            else:
                means.append(torch.full((encoder.dim,), torch.nan))
        embeddings: np.ndarray = normalize(torch.stack(means), dim=1).numpy()
        return embeddings

    return embed


def _open_encoder(folder: Path) -> FrozenEncoder:
    """Return a folder's encoder; its weights are read when they are first needed."""
    return open_frozen_encoder(folder, cache=FeatureCache(None), device=select_device())


def _open_retriever(folder: Path | None) -> EmbedFunction | None:
    """Return the embedding function of the independent retriever, or None without a folder.

    The retriever is a generating model or a frozen encoder (see `as_embedder`). It is opened at the
    first call of the function, which raises ModelError where that fails, and stays in memory.
    """
    if folder is None:
        return None

    @cache
    def open_once() -> EmbedFunction:
        """Open the retriever; later calls return the same function."""
        path = resolve_model(folder)
        if not can_generate(path):
            return as_embedder(_open_encoder(path))
        model = DuetModel.from_pretrained(path)
        note = log_first_truncation("retriever")
        return lambda items, is_query: model.encode(items, is_query=is_query, on_truncate=note)

    def embed(items: list[Parts], is_query: bool) -> np.ndarray:
        return open_once()(items, is_query)

    return embed


# ------------------------------------------------------------------ helpers that score answers


def open_settings_grader(settings: EvaluationSettings) -> GradeFunction | None:
    """Return the LLM grader of the settings (see `open_grader`), or None without one."""
    judge = settings.judge
    if judge is None:
        return None
    return open_grader(judge.url, model=judge.model, key_file=judge.key_file)


def open_fluency_model(settings: EvaluationSettings) -> FluencyModel | None:
    """Return the fluency model of the settings, or None without one.

    It is named by its folder and fingerprint. Its weights are read at the first call, which raises
    ModelError if the folder has no sequence-to-sequence model.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ModelError: its weights are not in safetensors format.
    """
    if settings.fluency is None:
        return None
    folder = resolve_model(settings.fluency)
    open_once = cache(BartScorer)

    def nats_per_token(pairs: Sequence[tuple[str, str]]) -> list[float]:
        return open_once(folder)(pairs)

    return FluencyModel(f"{folder.name} {fingerprint_encoder(folder)}", nats_per_token)


# ------------------------------------------------------------------ answers and likelihoods


def chat_messages(prompt: Parts, *, system: str | None) -> tuple[Message, ...]:
    """Return a prompt as one user turn, after a system turn where there is a system message."""
    user = Message("user", prompt)
    return (Message("system", (system,)), user) if system else (user,)


def is_single_image(prompt: Parts) -> bool:
    """Return whether a prompt is one image and nothing else."""
    return len(prompt) == 1 and isinstance(prompt[0], ImageRef)


def generate_answers(
    model: DuetModel,
    prompts: Sequence[Parts],
    max_new_tokens: int,
    *,
    system: str | None = None,
    max_tokens: int | None = None,
) -> list[str]:
    """Return greedy answers in the order of the prompts, generated in batches of similar length.

    A prompt of one image alone is continued as the model was trained to write captions; all others
    are user turns of a chat. No prompts give []. The model keeps its mode (training or evaluation).

    Args:
        max_new_tokens: longest answer, in tokens.
        system: system message before every prompt but a single image.
        max_tokens: longest prompt; None is the model's own limit.

    Raises:
        DataError: an image cannot be read, or a prompt does not fit into the limit.
        ConfigError: the checkpoint has no usable chat template.
    """
    renderer = model.renderer.with_options(max_tokens=max_tokens)
    sequences = []
    for prompt in prompts:
        if is_single_image(prompt):
            sequences.append(renderer.render_embedding(prompt))
        else:
            messages = chat_messages(prompt, system=system)
            sequences.append(renderer.render_chat(messages, add_generation_prompt=True))
    answers = [""] * len(prompts)
    for indices in group_by_length([len(s) for s in sequences], BATCH_TOKENS):
        inputs = model.prefill_inputs([sequences[i] for i in indices])
        texts = offline.generate_texts(model.backbone, inputs, max_new_tokens)
        for i, text in zip(indices, texts, strict=True):
            answers[i] = text
    return answers


def answer_nlls(
    model: DuetModel,
    pairs: Sequence[tuple[Parts, str]],
    *,
    system: str | None = None,
    max_tokens: int | None = None,
) -> list[tuple[float, int]]:
    """Return (total nats, number of tokens) of the answer in every (prompt, answer) pair.

    The end of the turn counts as part of the answer. After a prompt of one image alone, the answer
    is scored as its caption, without system message. No pairs give []. The model keeps its mode.
    Other arguments and errors are those of `generate_answers`.
    """
    renderer = model.renderer.with_options(max_tokens=max_tokens)

    def render(prompt: Parts, answer: str) -> TokenSequence:
        """Return the tokens of prompt and answer, with the answer and its end as labels.

        A single image is laid out with the answer as its caption, any other prompt as a chat after
        the system message. Raises DataError and ConfigError as `generate_answers` does.
        """
        if is_single_image(prompt):
            assert isinstance(prompt[0], ImageRef)
            return renderer.render_caption(prompt[0], answer)
        messages = (*chat_messages(prompt, system=system), Message("assistant", (answer,)))
        return renderer.render_chat(messages, add_generation_prompt=False)

    return model.compute_sequence_nll([render(prompt, answer) for prompt, answer in pairs])


# ------------------------------------------------------------------ evaluation of one model


def describe_provenance(
    folder: Path, facts: Mapping[str, Any], settings: EvaluationSettings
) -> dict[str, Any]:
    """Return what makes the predictions; another value of any entry is another run.

    Args:
        folder: folder of the model; only its name counts.
        facts: facts that identify the model, from `open_model_functions`.
    """
    retriever = settings.retriever
    judge = settings.judge
    return {
        "model": folder.name,
        **facts,
        "system": settings.system,
        "retriever": None if retriever is None else retriever.name,
        "judge": None if judge is None else judge.model or "the official one",
        "python": platform.python_version(),
        "vlduet": __version__,
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def evaluate_model(
    folder: Path,
    benchmarks: Sequence[Benchmark],
    *,
    data: Path,
    runs: Path,
    settings: EvaluationSettings,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Evaluate one model on several benchmarks; one that fails does not stop the others.

    Corpora that benchmarks need are downloaded into ``data/corpora``. Every benchmark and every
    failure is logged, and progress bars are shown. Interrupted runs continue.

    Args:
        folder: folder of the model.
        benchmarks: benchmarks in the order of their evaluation.
        data: folder of the official files.
        runs: folder that gets a folder per benchmark, with predictions and scores.

    Returns:
        The contents of scores.json of all benchmarks that ran, in order.
        The error message of every benchmark that raised VLDuetError, by its name.

    Raises:
        ModelError, ConfigError: the model or the grader cannot be opened, as in
            `open_model_functions`.
    """
    functions, facts = open_model_functions(folder, settings)
    provenance = describe_provenance(folder.resolve(), facts, settings)
    scores = []
    failures = {}
    for benchmark in benchmarks:
        logger.info(f"{benchmark.name}: {benchmark.title}")
        source = OfficialFiles(data, seed=settings.seed, k=settings.k)
        try:
            for corpus in benchmark.corpora:
                catalog.fetch_corpus(corpus, data / "corpora")
            score = evaluate(
                benchmark,
                functions,
                source=source,
                runs=runs,
                provenance=provenance,
                progress=with_progress_bar,
            )
            scores.append(score)
        except VLDuetError as error:
            failures[benchmark.name] = str(error)
            logger.info(f"{benchmark.name} is left out: {error}")
    return scores, failures


def with_progress_bar(items: Iterable[Any], label: str) -> Iterable[Any]:
    """Yield items one by one and show a progress bar (see `track_progress`)."""
    return track_progress(items, label=label)
