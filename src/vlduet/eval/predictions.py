"""Predictions on disk: every output of a model is kept before the next is asked for, so a stopped run goes on.

run.json             which benchmark, model, files and settings; another run may not write here
predictions.jsonl    {"key", "prompt", "text"}, one line an answer, flushed at once; the last line of a key holds
likelihoods.jsonl    {"key", "prompt", "options": [[nats, tokens], ...]}
reviews.jsonl        {"key", "prompt", "text"}, what a judge wrote
fluency.jsonl        {"by", "source", "target", "nats"}, nats a token by another model (WebQA's fluency)
vectors/NAME.f32     float32 rows, appended; NAME.json says of what
submission/...       files in the format that a server takes
scores.json          what came out
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlduet.data.quarantine import bisect_failures
from vlduet.data.records import ImageRef, Parts
from vlduet.errors import ConfigError, DataError
from vlduet.eval.benchmarks.tasks import Ask, Judged, Question
from vlduet.files import open_for_append, read_json_lines, write_text_atomically

Vectors = NDArray[np.float32]
T = TypeVar("T")
U = TypeVar("U")

EMBED_CHUNK, ANSWER_CHUNK = 128, 32
"""Items after which what was computed is on disk."""


@dataclass(frozen=True, slots=True)
class FluencyModel:
    """Another model that reads answers."""

    name: str
    """Names its weights: what another reader wrote is not taken for its own."""
    nats_per_token: Callable[[Sequence[tuple[str, str]]], Sequence[float]]
    """(source, target) pairs -> nats a token of each target after its source."""


@dataclass(frozen=True, slots=True)
class ModelFunctions:
    """What a model can do; a function that is None is one that it cannot.

    embed, other: (items, whether they are queries) -> float32[N, D]; `other` is an independent retriever's.
    answer: (prompts, longest answer in tokens) -> texts.
    loglikelihood: (prompt, continuation) pairs -> (nats, tokens), nats above 0.
    judge: (task, prompt, temperature) -> text.
    fluency: who reads how fluent an answer is.
    """

    embed: Callable[[list[Parts], bool], Vectors] | None = None
    generate: Callable[[list[Parts], int], list[str]] | None = None
    continuation_nll: Callable[[list[tuple[Parts, str]]], Sequence[tuple[float, int]]] | None = None
    retriever_embed: Callable[[list[Parts], bool], Vectors] | None = None
    grade: Callable[[Mapping[str, Any], str, float], str] | None = None
    fluency_model: FluencyModel | None = None


def prompt_text(parts: Parts) -> str:
    """A prompt as one text: `<image>` and a line end for every image, as LLaVA's files write it."""
    return "".join("<image>\n" if isinstance(part, ImageRef) else part for part in parts)


class PredictionStore:
    """A player that remembers; see `protocols.Player`.

    Args:
        folder: of this benchmark's run; made where it is missing.
        functions: the model's; Functions() plays from what is kept alone.
        seed: of the intervals.
        watch: wraps the loops, for a progress bar.
    """

    def __init__(
        self,
        folder: Path,
        functions: ModelFunctions,
        *,
        seed: int = 0,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
    ):
        self.folder, self.functions, self.seed, self.progress = folder, functions, seed, progress
        (folder / "vectors").mkdir(parents=True, exist_ok=True)

    # -------------------------------------------------------------- whose folder this is

    def claim_folder(self, identity: Mapping[str, Any]) -> None:
        """Write run.json, or check that it is the same run. Raises ConfigError naming what differs."""
        path = self.folder / "run.json"
        mine = json.loads(json.dumps(identity))
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in mine if kept.get(key) != mine[key]]
            if differing:
                what = f"another run: {_difference(differing[0], kept.get(differing[0]), mine[differing[0]])}"
                raise ConfigError(
                    what, place=self.folder, fix="Give another --to, or remove that folder"
                )
            return
        write_text_atomically(path, json.dumps(mine, indent=1) + "\n")

    # -------------------------------------------------------------- vectors

    def embed(self, items: Sequence[Parts], *, name: str, query: bool) -> Vectors:
        """float32[N, D]; rows of NaN where an item cannot be embedded."""
        return self._embed(self.functions.embed, items, name=name, query=query)

    def embed_with_retriever(
        self, items: Sequence[Parts], *, name: str, query: bool
    ) -> Vectors | None:
        """By the independent retriever; None without one and without its vectors."""
        if (
            self.functions.retriever_embed is None
            and not (self.folder / "vectors" / f"{name}.json").exists()
        ):
            return None
        return self._embed(self.functions.retriever_embed, items, name=name, query=query)

    def _embed(
        self,
        function: Callable[[list[Parts], bool], Vectors] | None,
        items: Sequence[Parts],
        *,
        name: str,
        query: bool,
    ) -> Vectors:
        path = self.folder / "vectors" / f"{name}.f32"
        named = hashlib.sha256(
            "\0".join(item_identity(parts) for parts in items).encode("utf-8", "replace")
        ).hexdigest()
        facts = {"items": named, "count": len(items), "query": query}
        kept = _json(path.with_suffix(".json"))
        if kept is None or any(kept.get(key) != value for key, value in facts.items()):
            if function is None:
                raise DataError(
                    "vectors of these items are not there", place=path, fix="Run it with a model"
                )
            path.unlink(missing_ok=True)
            kept = {}
        dim, found = int(kept.get("dim", 0)), np.zeros((0, 0), dtype=np.float32)
        if dim and path.exists():
            rows = path.stat().st_size // (4 * dim)
            found = np.fromfile(path, dtype=np.float32, count=rows * dim).reshape(rows, dim)
        if len(found) == len(items):
            return found
        if function is None:
            raise DataError(
                f"{len(items) - len(found)} vectors are not there",
                place=path,
                fix="Run it with a model",
            )
        blocks = [found] if len(found) else []
        starts = range(len(found), len(items), EMBED_CHUNK)
        with path.open("r+b" if path.exists() else "wb") as out:
            out.truncate(4 * dim * len(found))  # a killed run may have left half a row
            out.seek(0, 2)
            for begin in self.progress(starts, f"embedding {name}, in {EMBED_CHUNK}s"):
                block = embed_chunk(
                    function, list(items[begin : begin + EMBED_CHUNK]), query=query, dim=dim
                )
                if not dim:
                    dim = block.shape[1]
                    write_text_atomically(
                        path.with_suffix(".json"), json.dumps({**facts, "dim": dim})
                    )
                out.write(block.astype(np.float32).tobytes())
                out.flush()
                blocks.append(block)
        return np.concatenate(blocks)

    # -------------------------------------------------------------- answers

    def answer(self, questions: Sequence[Question], *, name: str = "") -> list[str | None]:
        """Answers in the order of the questions; None where there is none."""
        function = self.functions.generate

        def work(asked: list[Question]) -> list[str | None]:
            assert function is not None
            return bisect_failures(
                lambda qs: function([q.parts for q in qs], qs[0].max_new_tokens),
                asked,
                on_error=_missing,
            )

        # Questions of one length of answer go together, the longest prompts last.
        order = sorted(questions, key=lambda q: q.max_new_tokens)
        kept = self._kept(order, "predictions.jsonl", name, work if function else None)
        return [kept.get(_key(name, question)) for question in questions]

    def score_options(
        self, questions: Sequence[Question], *, name: str = ""
    ) -> list[list[tuple[float, int]] | None]:
        """(nats, tokens) of every option."""
        function = self.functions.continuation_nll

        def work(asked: list[Question]) -> list[Any]:
            assert function is not None
            return bisect_failures(lambda qs: _ranked(function, qs), asked, on_error=_missing)

        kept = self._kept(
            questions, "likelihoods.jsonl", name, work if function else None, field="options"
        )
        rows = [kept.get(_key(name, question)) for question in questions]
        return [
            None if row is None else [(float(nats), int(tokens)) for nats, tokens in row]
            for row in rows
        ]

    def _kept(
        self,
        questions: Sequence[Question],
        file: str,
        name: str,
        work: Callable[[list[Question]], list[Any]] | None,
        *,
        field: str = "text",
    ) -> dict[str, Any]:
        """What a file holds for these questions, after adding what it lacks."""
        path = self.folder / file
        rows = {row["key"]: row for row in read_json_lines(path)}
        prompts = {_key(name, question): prompt_identity(question) for question in questions}
        # A line without a prompt was written by somebody else (imported predictions) and is taken as it is.
        kept = {
            key: rows[key][field]
            for key, prompt in prompts.items()
            if key in rows and rows[key].get("prompt", prompt) == prompt
        }
        left = [question for question in questions if _key(name, question) not in kept]
        if work is None or not left:
            return kept
        with open_for_append(path) as out:
            for group in self.progress(
                list(group_questions(left)), f"answering, in {ANSWER_CHUNK}s"
            ):
                for question, found in zip(group, work(group), strict=True):
                    key = _key(name, question)
                    kept[key] = found
                    out.write(json_line({"key": key, "prompt": prompts[key], field: found}))
                out.flush()
        return kept

    # -------------------------------------------------------------- reviews

    def grade_answers(self, task: Judged, answers: Sequence[str | None]) -> list[str | None] | None:
        """What the judge wrote of every answer, asked for what is not kept; None without a judge and anything kept."""
        path, function = self.folder / "reviews.jsonl", self.functions.grade
        rows = {row["key"]: row for row in read_json_lines(path)}
        if function is None and not rows:
            return None
        found: list[str | None] = []
        with open_for_append(path) as out:
            for item, text in self.progress(list(zip(task.items, answers, strict=True)), "judging"):
                row = rows.get(item.id)
                if row is not None and row.get("answer", text) == text:
                    found.append(row["text"])
                elif function is None:
                    found.append(None)
                else:
                    found.append(task.review(item, text or "", bind_grader(function, task.judge)))
                    out.write(json_line({"key": item.id, "answer": text, "text": found[-1]}))
                    out.flush()
        return found

    def score_fluency(self, pairs: Sequence[tuple[str, str]]) -> list[float] | None:
        """Nats a token of every target after its source, asked for what is not kept; None where that cannot be done."""
        path, reader = self.folder / "fluency.jsonl", self.functions.fluency_model
        rows = [row for row in read_json_lines(path) if reader is None or row["by"] == reader.name]
        # Without a reader, what the last one wrote.
        kept = {
            (row["source"], row["target"]): float(row["nats"])
            for row in rows
            if row["by"] == rows[-1]["by"]
        }
        left = [pair for pair in dict.fromkeys(pairs) if pair not in kept]
        if reader is None:
            return None if left or not rows else [kept[pair] for pair in pairs]
        with open_for_append(path) as out:
            for begin in self.progress(
                range(0, len(left), ANSWER_CHUNK), f"reading answers, in {ANSWER_CHUNK}s"
            ):
                chunk = left[begin : begin + ANSWER_CHUNK]
                for pair, nats in zip(chunk, reader.nats_per_token(chunk), strict=True):
                    kept[pair] = float(nats)
                    out.write(
                        json_line(
                            {
                                "by": reader.name,
                                "source": pair[0],
                                "target": pair[1],
                                "nats": kept[pair],
                            }
                        )
                    )
                out.flush()
        return [kept[pair] for pair in pairs]

    def write_submission(self, name: str, data: bytes) -> None:
        """Write a file of the submission."""
        path = self.folder / "submission" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def bind_grader(
    function: Callable[[Mapping[str, Any], str, float], str], judge: Mapping[str, Any]
) -> Ask:
    """The judge's function as a review asks it."""
    return lambda prompt, temperature: function(judge, prompt, temperature)


# ------------------------------------------------------------------ small things


def item_identity(parts: Parts) -> str:
    """What identifies an item that is embedded: its text and the names of its images, wherever their folder is."""
    return "|".join(Path(part.name).name if isinstance(part, ImageRef) else part for part in parts)


def prompt_identity(question: Question) -> str:
    """A prompt with its images' names: the same prompt on another image is another prompt."""
    images = [Path(part.name).name for part in question.parts if isinstance(part, ImageRef)]
    options = "".join(f"\n[{option}]" for option in question.options)
    return prompt_text(question.parts) + options + "".join(f"\n({name})" for name in images)


def _key(name: str, question: Question) -> str:
    return f"{name}|{question.id}" if name else question.id


def group_questions(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Runs of at most ANSWER_CHUNK questions with one `max_new_tokens`."""
    group: list[Question] = []
    for question in questions:
        if group and (
            len(group) == ANSWER_CHUNK or group[0].max_new_tokens != question.max_new_tokens
        ):
            yield group
            group = []
        group.append(question)
    if group:
        yield group


def embed_chunk(
    function: Callable[[list[Parts], bool], Vectors], items: list[Parts], *, query: bool, dim: int
) -> Vectors:
    """Vectors of a chunk, with NaN for what cannot be embedded."""
    errors: list[DataError] = []

    def embed(some: list[Parts]) -> Vectors:
        return np.asarray(function(some, query), dtype=np.float32)

    rows = bisect_failures(embed, items, on_error=lambda _, error: errors.append(error))
    width = dim or next((len(row) for row in rows if row is not None), 0)
    if not width:  # nothing yet says how wide a vector is
        what = f"none of {len(items)} items can be embedded"
        raise (
            errors[0]
            if len(items) == 1
            else DataError(what, fix="Check the images with 'vlduet data check'")
        )
    return np.stack([np.full(width, np.nan, np.float32) if row is None else row for row in rows])


def _missing(question: Question, error: DataError) -> None:
    """A question that cannot be asked counts as missing in the score."""


def _ranked(
    function: Callable[..., Sequence[tuple[float, int]]], questions: list[Question]
) -> list[list[list[float]]]:
    """[[nats, tokens] of every option] of every question."""
    found = iter(
        function(
            [(question.parts, option) for question in questions for option in question.options]
        )
    )
    return [[list(next(found)) for _ in question.options] for question in questions]


def _difference(key: str, was: Any, now: Any) -> str:
    """In words; of two mappings, what they first differ in."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for inner in (*now, *was):
            if was.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", was.get(inner), now.get(inner))
    return f"{key} was {was!r}, is {now!r}"


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON. ASCII: a generated text may hold line ends that splitlines knows, and lone surrogates."""
    return json.dumps(value) + "\n"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found
