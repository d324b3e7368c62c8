"""Captions for what has none, short or long, by any local model that generates.

1. read      records, or a folder of images; a pair that lacks a wanted caption is work
2. ask       in batches: an instruction in the checkpoint's chat template, or the model's own image prompt; of several
             drafts and of texts that are known the model's own embedding chooses
3. keep      every batch in a journal beside the output, so that an interrupted run goes on
4. tidy      what was written, to whole sentences on one line
5. write     all records, whole or not at all, with what made a caption in their metadata
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from vlduet.data import formats
from vlduet.data.images import image_key
from vlduet.data.quarantine import Quarantine, bisect_failures, quarantine_path
from vlduet.data.records import ImageRef, Record, split_sentences
from vlduet.errors import ConfigError, DataError
from vlduet.files import open_for_append, read_json_lines
from vlduet.logs import track_progress

CaptionKind = Literal["short", "long"]

DEFAULT_INSTRUCTIONS: dict[CaptionKind, str] = {
    "short": "Describe the image in one short sentence.",
    "long": "Describe the image in detail.",
}
EMBEDDED = 256
"""Known texts that are embedded at a time."""

NO_INSTRUCTION = ""
"""The instruction that is none: go on from the model's own image prompt, as it was trained to."""


class Captioner(Protocol):
    """What is needed of a model; `DuetModel` is one."""

    @property
    def fingerprint(self) -> str:
        """Names everything that decides what the model writes."""

    def caption_images(
        self,
        images: Sequence[ImageRef],
        *,
        prompt: str = NO_INSTRUCTION,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        num_drafts: int = 1,
        known: Mapping[str, np.ndarray] | None = None,
    ) -> list[str]:
        """A text for every image."""

    def encode_query(self, items: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float32[N, E]."""


@dataclass(frozen=True, slots=True)
class CaptionSpec:
    """A caption that is wanted of every image."""

    kind: CaptionKind
    max_new_tokens: int
    """Longest, in tokens of the model."""
    prompt: str
    """The instruction; `OWN` for none."""
    num_drafts: int = 1
    """Of so many, the nearest to the image is taken; 0 writes none."""
    known: tuple[str, ...] = ()
    """Texts that it may be as well, where one is nearer than every draft."""


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """What a run did."""

    records: int
    """Written, those included that lacked nothing."""
    short: int
    """Records that got a short caption."""
    long: int
    generated: int
    """Captions that the model wrote in this run; the others were in the journal, or of an image that had been seen."""
    known: int
    """Captions that are one of the known texts."""
    empty: int
    """Captions that came out empty; their records are written without."""
    dropped: int
    causes: dict[str, int]


def build_caption_specs(
    *, short: int, long: int, prompt: str | None = None, drafts: int = 1, known: Sequence[str] = ()
) -> list[CaptionSpec]:
    """The wishes of the command line: longest short and long caption in tokens, 0 for none; one instruction for one length.

    Raises:
        ConfigError: nothing wanted, a negative length, one instruction for two lengths, known texts without short captions,
            no drafts where no known texts could stand in.
    """
    lengths: dict[CaptionKind, int] = {"short": short, "long": long}
    for kind, tokens in lengths.items():
        if tokens < 0:
            raise ConfigError(
                f"{tokens} tokens", place=f"--{kind}", fix="Give a length, or 0 for none"
            )
    names: dict[CaptionKind, tuple[str, ...]] = {"short": tuple(dict.fromkeys(known)), "long": ()}
    found = [
        CaptionSpec(
            kind,
            tokens,
            DEFAULT_INSTRUCTIONS[kind] if prompt is None else prompt,
            num_drafts=drafts,
            known=names[kind],
        )
        for kind, tokens in lengths.items()
        if tokens
    ]
    if not found:
        raise ConfigError(
            "neither short nor long captions are wanted",
            place="--short",
            fix="Give one of them a length",
        )
    if prompt is not None and len(found) == 2:
        what = "one instruction for captions of two lengths"
        raise ConfigError(
            what, place="--prompt", fix="Write one length at a time: add --long 0 or --short 0"
        )
    if known and not short:
        raise ConfigError(
            "known texts are short captions", place="--known", fix="Give --short a length"
        )
    if not drafts and (long or not known):
        raise ConfigError(
            "nothing is written without drafts",
            place="--drafts",
            fix="Give --known texts, and --long 0",
        )
    return found


def known_texts(path: Path) -> list[str]:
    """The texts of a .txt, one a line, or the short captions of records. Raises DataError where there are none."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot be read: {error}", place=path, fix="Give a text file in UTF-8"
            ) from None
        found = [" ".join(line.split()) for line in lines]
    else:
        found = [text for record in formats.read_records(path) for text in record.short]
    found = [text for text in found if text]
    if not found:
        raise DataError(
            "no texts",
            place=path,
            fix="Give a .txt with one a line, or records with short captions",
        )
    return found


def write_missing_captions(
    model: Captioner,
    source: Path,
    *,
    output: Path,
    specs: Sequence[CaptionSpec],
    model_name: str = "",
    batch_size: int = 16,
) -> CaptionReport:
    """Write the records of `source` with the captions that they lack.

    Args:
        model: writes them, greedily, so that equal runs give equal captions.
        source: a file of records, or a folder of images. Records that are no pairs pass as they are.
        to: the ``.jsonl`` to write; images that cannot be decoded are left out and listed in ``<to>.quarantine.jsonl``.
        wanted: which captions; what a record has is never replaced.
        name: of the model, for the metadata.
        batch: images a forward.

    Raises:
        ConfigError: a batch below 1. DataError: the source as a whole cannot be read, or `to` is no target.
    """
    if batch_size < 1:
        raise ConfigError(f"{batch_size}", place="--batch", fix="Give 1 or more")
    formats.check_output_path(output, source, allow_existing=True)
    dropped = Quarantine.create(quarantine_path(output))
    settings = json.dumps([model.fingerprint, [asdict(wish) for wish in specs]])
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = _Journal(
        output.with_name(
            f".{output.name}.{hashlib.sha256(settings.encode()).hexdigest()[:12]}.captions"
        )
    )
    job = _Job(model, specs, journal=journal, dropped=dropped, name=model_name, batch=batch_size)

    def broken(error: DataError) -> None:
        dropped.add(error.place, error)

    records = formats.read_records(source, on_error=broken)
    grows = formats.is_file_inside(output, source)
    if grows:  # written into the folder of images by an earlier run; there may be new images since
        records = formats.append_unlisted_images(records, source, on_error=broken)
    found = _all_of(output, job.filled(records)) if grows else job.filled(records)
    count = sum(
        1
        for _ in track_progress(
            formats.stream_to_jsonl(found, output), label=f"captioning {source.name}"
        )
    )
    journal.path.unlink(missing_ok=True)
    return CaptionReport(
        records=count,
        short=job.written["short"],
        long=job.written["long"],
        generated=job.generated,
        known=job.known,
        empty=job.empty,
        dropped=dropped.count,
        causes=dropped.count_by_cause(),
    )


def _all_of(old: Path, records: Iterable[Record]) -> Iterator[Record]:
    """The records, if they hold every row of the file that they are to replace. Raises DataError at the end if not."""
    with old.open("rb") as lines:
        rows = sum(bool(line.strip()) for line in lines)
    kept = 0
    for record in records:
        kept += record.place is not None and Path(record.place.file).resolve() == old.resolve()
        yield record
    if kept < rows:
        what = f"{rows - kept} of its {rows} records cannot be used (see {quarantine_path(old)}), and would be lost"
        raise DataError(what, place=old, fix="Mend them, or write to another file")


def tidy_caption(text: str, *, max_sentences: int | None = None) -> str:
    """Whole sentences on one line: blanks joined, quotes around all of it gone, and a last sentence that the limit cut in
    half gone too, unless it is the only one.

    Args:
        sentences: keep the first so many.
    """
    text = text.strip()
    if len(text) > 1 and text[0] in "\"“'‘" and text[-1] in "\"”'’":
        text = text[1:-1]
    pieces = [" ".join(piece.split()) for piece in split_sentences(text)]
    if len(pieces) > 1 and not pieces[-1].rstrip("\"'”’)]").endswith(
        (".", "!", "?", "…", "。", "！", "？")
    ):
        pieces.pop()
    return " ".join(pieces[:max_sentences])


class _Journal:
    """What a run has written so far: a line a caption, on the disk before the next batch begins."""

    def __init__(self, path: Path):
        self.path = path
        self.texts: dict[tuple[str, str], str] = {}
        for row in read_json_lines(path):  # one that was cut short is written again
            self.texts[row["kind"], row["image"]] = row["text"]

    def add(self, kind: CaptionKind, texts: dict[str, str]) -> None:
        """Captions by the content of their image."""
        rows = [
            json.dumps({"kind": kind, "image": key, "text": text}) + "\n"
            for key, text in texts.items()
        ]
        with open_for_append(self.path) as file:
            file.write("".join(rows))
            file.flush()
            os.fsync(file.fileno())
        self.texts |= {(kind, key): text for key, text in texts.items()}


class _Job:
    """The state of one run."""

    def __init__(
        self,
        model: Captioner,
        wanted: Sequence[CaptionSpec],
        *,
        journal: _Journal,
        dropped: Quarantine,
        name: str,
        batch: int,
    ):
        self.model, self.wanted, self.journal, self.dropped = model, wanted, journal, dropped
        self.name, self.batch = name, batch
        self.written: dict[CaptionKind, int] = {"short": 0, "long": 0}
        self.generated = self.known = self.empty = 0
        self.vectors = {wish.kind: _embedded(model, wish.known) for wish in wanted}

    def filled(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records with their captions, without those whose image is broken.

        In groups by position, so that a run that goes on makes the same batches as one without a stop.
        """
        group: list[tuple[Record, str]] = []
        for record in records:
            try:
                assert record.image is not None or not self._lacks(record)
                group.append(
                    (
                        record,
                        image_key(record.image) if record.image and self._lacks(record) else "",
                    )
                )
            except DataError as error:
                self.dropped.add(record, error)
            if len(group) == self.batch:
                yield from self._group(group)
                group = []
        yield from self._group(group)

    def _lacks(self, record: Record) -> list[CaptionSpec]:
        return (
            [w for w in self.wanted if not getattr(record, w.kind)] if record.kind == "pair" else []
        )

    def _group(self, group: Sequence[tuple[Record, str]]) -> Iterator[Record]:
        failed: dict[str, DataError] = {}
        for wish in self.wanted:
            missing: dict[str, ImageRef] = {}
            for record, key in group:
                if (
                    wish in self._lacks(record)
                    and (wish.kind, key) not in self.journal.texts
                    and key not in failed
                ):
                    assert record.image is not None
                    missing[key] = record.image
            texts = self._write(missing, wish, failed)
            if texts:
                self.journal.add(wish.kind, texts)
            self.generated += len(texts)
        for record, key in group:
            if key in failed:
                self.dropped.add(record, failed[key])
            else:
                yield self._with_captions(record, key)

    def _write(
        self, images: dict[str, ImageRef], wish: CaptionSpec, failed: dict[str, DataError]
    ) -> dict[str, str]:
        """Texts by key; what cannot be read goes to `failed`."""

        def write(keys: list[str]) -> list[str]:
            refs = [images[key] for key in keys]
            return self.model.caption_images(
                refs,
                prompt=wish.prompt,
                max_new_tokens=wish.max_new_tokens,
                batch_size=self.batch,
                num_drafts=wish.num_drafts,
                known=self.vectors[wish.kind],
            )

        keys = list(images)
        texts = bisect_failures(write, keys, on_error=failed.__setitem__)
        return {key: text for key, text in zip(keys, texts, strict=True) if text is not None}

    def _with_captions(self, record: Record, key: str) -> Record:
        found: dict[str, Any] = {}
        told: dict[str, Any] = {}
        for wish in self._lacks(record):
            text = self.journal.texts[wish.kind, key]
            known = text in self.vectors[wish.kind]
            text = (
                text
                if known
                else tidy_caption(text, max_sentences=1 if wish.kind == "short" else None)
            )
            if not text:
                self.empty += 1
                continue
            found[wish.kind] = (text,) if wish.kind == "short" else text
            told[wish.kind] = {"model": self.name, "fingerprint": self.model.fingerprint}
            told[wish.kind] |= {
                "prompt": wish.prompt or "the model's own",
                "tokens": wish.max_new_tokens,
            }
            told[wish.kind] |= {"drafts": wish.num_drafts, "known": known}
            self.written[wish.kind] += 1
            self.known += known
        if not found:
            return record
        before = record.metadata.get("captioned")
        captioned = {**(before if isinstance(before, dict) else {}), **told}
        return replace(record, **found, metadata={**record.metadata, "captioned": captioned})


def _embedded(model: Captioner, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The texts with their vectors."""
    groups = [texts[begin : begin + EMBEDDED] for begin in range(0, len(texts), EMBEDDED)]
    vectors = (
        model.encode_query(group) for group in track_progress(groups, label="known texts, groups")
    )
    return {
        text: vector
        for group, found in zip(groups, vectors, strict=True)
        for text, vector in zip(group, found, strict=True)
    }
