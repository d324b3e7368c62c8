"""Call vlduet for the frozen tests: the only module of theirs that a rename or a move adapts.

Names of tensors, losses and arguments in the stored data are those of this module, so that a
rename in vlduet is a line in this file and leaves the data alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frozen import fixed
from helpers.precision import compute_in_double
from vlduet import config as configs
from vlduet.data.formats import read_jsonl as records
from vlduet.data.records import ImageRef, Message, Parts
from vlduet.eval import metrics, protocols
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import SUITES, get_benchmark
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.generation.continuous import ContinuousBatcher, Request
from vlduet.model.generation.inputs import suppressed_tokens
from vlduet.model.prompts import Prompts
from vlduet.objectives import contrastive, language, structure
from vlduet.objectives.gak import api as alignment
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import search
from vlduet.train import loader, setup, step

# The function of this name, which the package exports, hides the module.
sugar_targets = import_module("vlduet.objectives.sugar_targets")

Item = str | Path
"""A text, or an image by its path."""

__all__ = [
    "alignment",
    "contrastive",
    "language",
    "metrics",
    "protocols",
    "records",
    "structure",
    "sugar_targets",
]
"""Modules whose functions of plain arrays the tests call by name."""

BARE = {
    "image": "{image}",
    "text": "{text}</s>",
    "parts": "{parts}</s>",
    "chat": False,
    "image_pool": "mean",
}
"""Prompts that add nothing to what is embedded."""

# ------------------------------------------------------------------ models


def open_in_single(folder: Path, *, head: str, dim: int, prompts: dict[str, Any]) -> DuetModel:
    """Open a checkpoint in float32, with a head whose weights are fixed."""
    model = DuetModel(load_backbone(folder), prompts=Prompts(**prompts), head=head, dim=dim)
    fixed.fill(own_tensors(model, "head."), scale=1.0)
    return model.eval()


def open_in_double(folder: Path, *, head: str, dim: int, prompts: dict[str, Any]) -> DuetModel:
    """Open the same in float64."""
    return in_double(open_in_single(folder, head=head, dim=dim, prompts=prompts))


def in_double(model: Any) -> Any:
    """Let a model compute in float64, without dropout."""
    model = model.double().eval()
    if isinstance(model, DuetModel):
        compute_in_double(model.backbone)
        model.backbone.model.set_experts_implementation("eager")
    return model


def own_tensors(model: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the trained tensors beside the adapter whose frozen names begin with `prefix`."""
    return {n: t for n, t in model.own_tensors().items() if n.startswith(prefix)}


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """Return every tensor that gets a gradient, by its frozen name."""
    named = {**model.own_tensors(), **model.adapter_tensors()}
    return {name: value for name, value in named.items() if value.requires_grad}


def parts(items: Sequence[Item]) -> Parts:
    """Return texts and images as vlduet takes them."""
    return tuple(ImageRef(path=item) if isinstance(item, Path) else item for item in items)


def encode(model: DuetModel, items: Sequence[Sequence[Item]], *, query: bool) -> np.ndarray:
    """Return float32[items, dim], the embeddings of texts, images and mixtures."""
    return model.encode([parts(item) for item in items], is_query=query)


def fingerprint(model: DuetModel) -> str:
    """Return the name of everything that decides an embedding."""
    return model.fingerprint


# ------------------------------------------------------------------ generation


def answer(model: DuetModel, turn: Sequence[Item], *, tokens: int) -> dict[str, Any]:
    """Return what a greedy model answers: at once, streamed, and as ids."""
    turns = (Message("user", parts(turn)),)
    start = model.prefill_inputs([model.renderer.render_chat(turns, add_generation_prompt=True)])
    decoder = ContinuousBatcher(model.backbone, start.eos_token_ids)
    row = Request(tokens)
    decoder.add_requests(start, [row])
    while not row.is_finished:
        decoder.step()
    return {
        "text": model.generate(turns, max_new_tokens=tokens),
        "streamed": "".join(model.generate(turns, max_new_tokens=tokens, stream=True)),
        "ids": row.token_ids,
    }


def caption(model: DuetModel, images: Sequence[Path], *, tokens: int, drafts: int) -> list[str]:
    """Return captions, greedy or the nearest of several drafts."""
    return model.caption_images(
        [ImageRef(path=i) for i in images], max_new_tokens=tokens, num_drafts=drafts
    )


def caption_nats(model: DuetModel, pairs: Sequence[tuple[Path, str]]) -> list[tuple[float, int]]:
    """Return nats and tokens of every caption after its image."""
    return model.compute_caption_nll([(ImageRef(path=image), text) for image, text in pairs])


def smallest_margin(model: DuetModel, turn: Sequence[Item], *, ids: Sequence[int]) -> float:
    """Return by how much a greedy answer's tokens beat the next best, at the closest of them."""
    prompt = model.renderer.render_chat((Message("user", parts(turn)),), add_generation_prompt=True)
    ignored = -100
    labels = (*prompt.labels, *([ignored] * len(ids)))
    answered = replace(prompt, token_ids=(*prompt.token_ids, *ids), labels=labels)
    with torch.no_grad():
        states = model.hidden_states(model.collate([answered]))[0, len(prompt.token_ids) - 1 : -1]
        logits = model.backbone.compute_logits(states)
    start = model.prefill_inputs([prompt])
    logits[:, suppressed_tokens(model.backbone, start.eos_token_ids)] = -torch.inf
    logits[0, start.eos_token_ids] = -torch.inf
    best = logits.topk(2, dim=1).values
    assert logits.argmax(1).tolist() == list(ids), "not the greedy answer"
    return float((best[:, 0] - best[:, 1]).min())


# ------------------------------------------------------------------ training


def one_step(path: Path, overrides: Sequence[str]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Compute one step of a config, move, and compute the losses of the next step.

    Returns:
        Losses and gradient norm by name, the losses of the second step among them; gradients of
        the first step by the frozen names of their tensors.
    """
    run = setup.prepare_run(configs.load_run_config(path, overrides), write_files=False)
    in_double(run.model)
    fixed.fill(own_tensors(run.model, "head."), scale=1.0)
    fixed.fill(own_tensors(run.model, "towers."), scale=1.0)
    fixed.fill(run.model.adapter_tensors(), scale=0.5)
    if isinstance(run.model, DuetModel):
        run.model.feature_cache = FeatureCache(None)
    (_, first), (_, second) = list(loader.iterate_batches(run, 0, 2))
    values = step.forward_backward(run, first)
    tensors = trained_tensors(run.model)
    gradients = {n: t.grad.clone() for n, t in tensors.items() if t.grad is not None}
    step.optimizer_step(run, 0)
    after = {
        f"{name} of step 2": value for name, value in step.forward_backward(run, second).items()
    }
    return values | after, gradients


def comparison(path: Path) -> tuple[Path, dict[str, list[str]]]:
    """Return the base config of a comparison, and the settings of every run by name."""
    read = configs.load_comparison_config(path)
    return configs.find_config(read.base), {
        name: [*read.overrides, *settings] for name, settings in read.runs.items()
    }


def sources(path: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Return path and weight of every training source of a config."""
    read = configs.load_run_config(path, overrides)
    return [{"path": str(source.path), "weight": source.weight} for source in read.data.train]


def settings(path: Path, overrides: Sequence[str]) -> Any:
    """Return a config, read."""
    return configs.load_run_config(path, overrides)


# ------------------------------------------------------------------ folders


def write_model(base: Path, folder: Path) -> None:
    """Write a model folder with an adapter, soft prompts and a head, whose weights are fixed."""
    texts = {"text": "{text} sum:", "image": "{image} sum:", "parts": "{parts} sum:"}
    prompts = Prompts(**BARE | texts | {"image_pool": "last"})
    model = DuetModel(load_backbone(base), prompts=prompts, head="mlp", dim=8)
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True, soft_prompts=True)
    fixed.fill({**own_tensors(model, "head."), **model.adapter_tensors()}, scale=1.0)
    model.save_pretrained(folder, provenance={"written by": "tests/frozen/write.py"})


def open_model(folder: Path) -> DuetModel:
    """Open a model folder, its golden vectors compared."""
    return DuetModel.from_pretrained(folder)


def write_index(model: Path, source: Path, folder: Path) -> None:
    """Write a search index of records."""
    build_index(open_model(model), source, to=folder, side="image", model_path=model)


def hits(index: Path, query: Sequence[Item], *, k: int, where: str | None) -> list[dict[str, Any]]:
    """Search an index with the model that it names."""
    with Index.open(index) as opened:
        model = DuetModel.from_pretrained(opened.model_path)
        ranked = search(opened, model, parts(query), k=k, where=where)
    paths = [hit.image.path for hit in ranked if hit.image is not None]
    assert len(paths) == len(ranked)
    return [
        {
            "id": hit.id,
            "score": hit.score,
            "text": hit.text,
            "image": path.name,
            "image exists": path.is_file(),
            "metadata": dict(hit.metadata),
        }
        for hit, path in zip(ranked, paths, strict=True)
        if path is not None
    ]


def stored_vectors(index: Path) -> tuple[list[str], np.ndarray]:
    """Return the ids of an index, sorted, and their vectors, float32[ids, dim]."""
    with Index.open(index) as opened:
        ids = sorted(opened.store.read_hashes())
        return ids, opened.store.read_vectors(ids)


# ------------------------------------------------------------------ benchmarks


def benchmark_names() -> list[str]:
    """Return the names of the built-in suite."""
    return [benchmark.name for benchmark in SUITES["builtin"]]


def play(
    name: str,
    folder: Path,
    *,
    runs: Path,
    embed: Callable[[Parts], np.ndarray],
    reply: Callable[[Parts], str],
    nats: Callable[[Parts, str], tuple[float, int]],
) -> dict[str, Any]:
    """Play one benchmark of the built-in suite with functions instead of a model."""

    def vectors(items: list[Parts], query: bool) -> np.ndarray:
        return np.stack([embed(item) for item in items]).astype(np.float32)

    functions = ModelFunctions(
        embed=vectors,
        generate=lambda prompts, longest: [reply(prompt) for prompt in prompts],
        continuation_nll=lambda pairs: [nats(prompt, text) for prompt, text in pairs],
    )
    row = get_benchmark(name)
    return evaluate(
        row, functions, source=OfficialFiles(folder), runs=runs, provenance={"fixed": True}
    )


def content(item: Parts) -> Iterator[str]:
    """Yield what names each part of an item: a text, or the bytes of an image in hexadecimal."""
    for part in item:
        if isinstance(part, ImageRef):
            yield (part.data or part.path.read_bytes()).hex()  # type: ignore[union-attr]
        else:
            yield part


def tokenize_answer(text: str) -> list[str]:
    """Return a text's words as captions are compared."""
    return metrics.tokenize_answer(text)
