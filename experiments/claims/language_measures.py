"""Measures of what a model writes and answers, of its hidden states, and of its training losses.

Random choices are the same for every model.
"""

from __future__ import annotations

import numpy as np
from subjects import Measurements, Subject, percent, read_pairs

from vlduet.data.formats import read_jsonl
from vlduet.data.records import Parts
from vlduet.data.vectors import unit_rows
from vlduet.demo.measure import MAX_CAPTION_TOKENS
from vlduet.eval import protocols
from vlduet.eval.benchmarks.builtin import (
    IMAGES_PER_PROMPT,
    draw_options,
    make_position_questions,
)
from vlduet.eval.benchmarks.builtin_rag import make_solved_question_task
from vlduet.eval.benchmarks.scores import average, average_per_token
from vlduet.eval.metrics import tokenize_answer
from vlduet.eval.plain_questions import PLAIN_QUESTIONS
from vlduet.harness.builtin import answer_nlls
from vlduet.inspect import internals
from vlduet.logs import read_metrics
from vlduet.model.likelihood import compute_answer_nll

NUM_ATTENTION_MAPS = 32
NUM_SHARED_COMPONENTS = 10
"""Number of components outside of which the energy of the image embeddings is measured."""
NUM_POSITION_PROMPTS = 24
NUM_RAG_QUESTIONS = 120
LAST_STEPS = 16
"""Number of the last training steps whose losses are averaged."""


# ------------------------------------------------------------------ captions and answers


def measure_captions(subject: Subject) -> Measurements:
    """Return how well a model writes: captions of test stamps, and plain answers.

    Numbers are the cross entropy of captions, how much more a wrong image costs, the word F1 of
    generated captions, and the cross entropy of answers without an image.
    """
    model = subject.generator
    entropy = protocols.measure_caption_cross_entropy(model.compute_caption_nll, subject.stamps)
    increase = entropy.total_nats_wrong_image - entropy.total_nats_right_image
    captions = protocols.measure_captions(
        lambda images: model.caption_images(images, max_new_tokens=MAX_CAPTION_TOKENS),
        subject.stamps,
    )
    answers = np.array(compute_answer_nll(model, PLAIN_QUESTIONS), dtype=np.float64)
    return {
        "captions, nats": average_per_token(entropy.total_nats_right_image, entropy.num_tokens),
        "wrong image, nats more": average_per_token(increase, entropy.num_tokens),
        "captions, word F1": average([item.token_f1 for item in captions.items]),
        "chat, nats": average_per_token(answers[:, 0], answers[:, 1]),
    }


def measure_choices(subject: Subject) -> Measurements:
    """Return how often the likeliest of four captions is that of a test stamp.

    The wrong captions are of stamps of the same category as far as there are any, else of others:
    questions that ask to discriminate. Chance is 25.
    """
    random = np.random.default_rng(0)
    requests: list[tuple[Parts, str]] = []
    correct = []
    for record in subject.stamps:
        assert record.image is not None
        words = tokenize_answer(record.short[0])
        candidates = [
            (other.metadata["category"] == record.metadata["category"], other.short[0])
            for other in subject.stamps
            if tokenize_answer(other.short[0]) != words
        ]
        near = sorted({text for is_near, text in candidates if is_near})
        far = sorted({text for is_near, text in candidates if not is_near} - set(near))
        pool = near if len(near) >= 3 else [*near, *random.permutation(far)[: 3 - len(near)]]
        options, index = draw_options(random, record.short[0], [str(text) for text in pool])
        requests += [((record.image,), option) for option in options]
        correct.append(index)
    losses = np.array([nats / tokens for nats, tokens in answer_nlls(subject.generator, requests)])
    likeliest = losses.reshape(len(correct), -1).argmin(1)
    return {"caption of four": percent(likeliest == np.array(correct))}


def measure_places(subject: Subject) -> Measurements:
    """Return whether the likeliest of six captions is that of a stamp that is shown again.

    ``place, edges less middle`` has a value per prompt; the others have one per question.
    """
    path = subject.data / "stamps" / "test.jsonl"
    questions = make_position_questions(
        list(read_jsonl(path)), num_prompts=NUM_POSITION_PROMPTS, seed=0, place=path
    )
    requests = []
    for question in questions:
        requests += [(question.prompt, option) for option in question.options]
    model = subject.generator
    limit = max(model.renderer.max_tokens, model.backbone.context_length or 0)
    nlls = answer_nlls(model, requests, max_tokens=limit)
    losses = np.array([nats / tokens for nats, tokens in nlls])
    losses = losses.reshape(NUM_POSITION_PROMPTS, IMAGES_PER_PROMPT, IMAGES_PER_PROMPT)
    is_right = losses.argmin(2) == np.arange(IMAGES_PER_PROMPT)  # [prompts, places]
    is_edge = np.isin(np.arange(IMAGES_PER_PROMPT), (0, IMAGES_PER_PROMPT - 1))
    difference = is_right[:, is_edge].mean(1) - is_right[:, ~is_edge].mean(1)
    return {
        "place, accuracy": percent(is_right.ravel()),
        "place, edges less middle": average(difference),
    }


def measure_rag(subject: Subject) -> Measurements:
    """Return answers to questions for the kind of a test stamp, with different retrievers.

    The reference is the best training stamp with its question and answer: none, that of the
    model's own embeddings, or that of the external retriever. Options are ranked by likelihood.
    """
    train = read_pairs(subject.data / "stamps" / "train.jsonl")
    task = make_solved_question_task(subject.stamps, train, num_questions=NUM_RAG_QUESTIONS, seed=0)
    keys = [entry.search_views[0] for entry in task.entries]
    queries = [views[0] for views in task.query_views]
    assert subject.retriever is not None, "this group needs the external retriever"
    similarities = {
        "own retrieval": unit_rows(subject.embed_query(queries))
        @ unit_rows(subject.embed_document(keys)).T,
        "external retriever": unit_rows(subject.retriever(queries))
        @ unit_rows(subject.retriever(keys)).T,
    }
    selections: dict[str, list[list[int]]] = {"no retrieval": [[] for _ in task.items]}
    for name, similarity in similarities.items():
        for row, excluded in enumerate(task.excluded_entries):
            similarity[row, list(excluded)] = -np.inf
        selections[name] = [[int(row)] for row in similarity.argmax(1)]
    numbers: Measurements = {}
    for name, selection in selections.items():
        is_right = []
        for item, indices in zip(task.items, selection, strict=True):
            prompt = task.build_prompt(item, [task.entries[index] for index in indices])
            nlls = answer_nlls(subject.generator, [(prompt, text) for text in item.options])
            likeliest = int(np.argmin([nats / tokens for nats, tokens in nlls]))
            is_right.append(likeliest == item.reference)
        numbers[f"questions, {name}"] = percent(np.array(is_right))
    return numbers


# ------------------------------------------------------------------ analysis and losses


def measure_reading(subject: Subject) -> Measurements:
    """Return the three analyses of VladVA at the token where images are read, of test stamps.

    ``energy beyond 10 components`` is the share of the squared length of an image's embedding that
    lies outside of the first ten singular vectors of all: an item's part of the explained variance.
    """
    images = tuple(record.image for record in subject.stamps if record.image is not None)
    analysis = internals.analyse_model(
        subject.generator,
        internals.AnalysisItems(images, ()),
        name="model",
        num_attention_maps=NUM_ATTENTION_MAPS,
    )
    assert analysis.images is not None
    vectors = unit_rows(analysis.images.embeddings)
    _, _, components = np.linalg.svd(vectors, full_matrices=False)
    inside = ((vectors @ components[:NUM_SHARED_COMPONENTS].T) ** 2).sum(1)
    return {
        "entropy, nats": average(analysis.images.entropy, scale=1.0),
        "energy beyond 10 components": average(1 - inside),
        "evenness of attention": average([item.evenness for item in analysis.attention_maps]),
    }


def measure_losses(subject: Subject) -> Measurements:
    """Return the losses of the last `LAST_STEPS` training steps; one item per step.

    The contrastive loss is in percent of that of equal scores, 2 log(batch size); the language loss
    is in nats per token. A run logs every step.
    """
    assert subject.run is not None, "this group needs a training run"
    rows = [row for row in read_metrics(subject.run / "metrics.jsonl") if "loss" in row]
    rows = rows[-LAST_STEPS:]
    numbers: Measurements = {}
    if all("contrastive" in row for row in rows):
        chance = 2 * np.log(subject.batch_size)
        shares = np.array([row["contrastive"] for row in rows]) / chance
        numbers["contrastive loss, % of chance"] = average(shares)
    if all("language" in row for row in rows):
        values = np.array([row["language"] for row in rows])
        numbers["language loss, nats"] = average(values, scale=1.0)
    return numbers
