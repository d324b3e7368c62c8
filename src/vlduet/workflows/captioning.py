"""Captions for images that have none, short or long, by any local model that generates.

1. read       records, or a folder of images; every pair that lacks a requested caption is work
2. generate   in batches: an instruction in the checkpoint's chat template, or the model's own image
              prompt; of several drafts, the one whose embedding is nearest to the image's
3. journal    every batch, beside the output, so that an interrupted run continues
4. tidy       the text to whole sentences on one line
5. write      all records, or none, with the origin of each caption in the metadata
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from vlduet.data import formats, jsonl_output
from vlduet.data.images import image_key
from vlduet.data.quarantine import Quarantine, bisect_failures, quarantine_path
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import ImageRef, Record, split_sentences
from vlduet.data.sources import SourceLike, as_source
from vlduet.errors import ConfigError, DataError
from vlduet.files import open_for_append, read_json_lines
from vlduet.logs import track_progress

CaptionKind = Literal["short", "long"]

DEFAULT_INSTRUCTIONS: dict[CaptionKind, str] = {
    "short": "Describe the image in one short sentence.",
    "long": "Describe the image in detail.",
}
NO_INSTRUCTION = ""
"""Prompt without instruction: the model continues its own image prompt, as it was trained to."""


class Captioner(Protocol):
    """Model that can caption images; `DuetModel` is one."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides what the model generates."""

    def caption_images(
        self,
        images: Sequence[ImageRef],
        *,
        prompt: str = NO_INSTRUCTION,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        num_drafts: int = 1,
    ) -> list[str]:
        """Return one text per image. Raise DataError if an image cannot be read."""


@dataclass(frozen=True, slots=True)
class CaptionSpec:
    """Request for one kind of caption of every image."""

    kind: CaptionKind
    max_new_tokens: int
    """Length limit, in tokens of the model."""
    prompt: str
    """Instruction; `NO_INSTRUCTION` for none."""
    num_drafts: int = 1
    """Number of drafts, of which the nearest to the image is taken."""


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """Counts of one run. The field names are the keys of ``--json``."""

    records: int
    """Written records, including those that lacked no caption."""
    short: int
    """Records that received a short caption."""
    long: int
    """Records that received a long caption."""
    generated: int
    """Captions generated in this run; others came from the journal or from an equal image."""
    empty: int
    """Captions without text; their records are written without them."""
    dropped: int
    """Records that were left out, listed in the quarantine."""
    causes: dict[str, int]
    """Number of dropped records by cause."""


def build_caption_specs(
    *, short: int, long: int, prompt: str | None = None, drafts: int = 1
) -> list[CaptionSpec]:
    """Return the requests for captions that options of the command line describe.

    Args:
        short: length limit of short captions in tokens; 0 for none.
        long: length limit of long captions in tokens; 0 for none.
        prompt: instruction instead of the default of the kind, `NO_INSTRUCTION` for none; only for
            one kind of caption.
        drafts: number of drafts per caption.

    Returns:
        One request per kind whose length is not 0, short before long.

    Raises:
        ConfigError: a value is out of range, no captions are requested, or there is one prompt for
            two kinds of captions.
    """
    limits: dict[CaptionKind, int] = {"short": short, "long": long}
    for kind, limit in limits.items():
        if limit < 0:
            fix = "Give a length, or 0 for none"
            raise ConfigError(f"{limit} tokens", place=f"--{kind}", fix=fix)
    if not short and not long:
        message = "neither short nor long captions are wanted"
        raise ConfigError(message, place="--short", fix="Give one of them a length")
    if prompt is not None and short and long:
        message = "one instruction for captions of two lengths"
        fix = "Write one length at a time: add --long 0 or --short 0"
        raise ConfigError(message, place="--prompt", fix=fix)
    if drafts < 1:
        raise ConfigError(f"{drafts} drafts", place="--drafts", fix="Give 1 or more")
    return [
        CaptionSpec(kind, limit, DEFAULT_INSTRUCTIONS[kind] if prompt is None else prompt, drafts)
        for kind, limit in limits.items()
        if limit
    ]


def write_missing_captions(
    model: Captioner,
    source: SourceLike,
    *,
    output: Path,
    specs: Sequence[CaptionSpec],
    model_name: str = "",
    batch_size: int = 16,
) -> CaptionReport:
    """Write the records of `source` to a file, with the captions that they lack.

    Captions that a record has are never replaced. An interrupted run that is started again with the
    same model and `specs` takes the captions that it generated before from a hidden journal beside
    `output`, which is deleted at the end. The quarantine of an earlier run is deleted at the start.
    Progress is logged.

    Args:
        model: generates the captions, greedily, so that equal runs give equal files.
        source: file of records or folder of images. Records other than pairs are copied.
        output: ``.jsonl`` to write, complete or not at all. Records whose image cannot be decoded
            are left out and listed in ``<stem of output>.quarantine.jsonl``; images that exist only
            as bytes are written to ``<stem of output>-images/``. Its folder is created. It may be a
            file of the folder `source`, which is then extended by the captions of new images.
        specs: kinds of captions to write.
        model_name: name of the model for the metadata.
        batch_size: number of images per forward pass.

    Raises:
        ConfigError: `batch_size` is below 1.
        DataError: the source cannot be read at all, `output` is no ``.jsonl`` or the source itself,
            or a record of an existing `output` would be lost.
        LockError: another process is writing `output`.
    """
    if batch_size < 1:
        raise ConfigError(f"{batch_size}", place="--batch", fix="Give 1 or more")
    source = as_source(source)
    with jsonl_output.lock_jsonl_output(output, source.path, allow_existing=True) as quarantine:
        settings = json.dumps([model.fingerprint, [asdict(spec) for spec in specs]])
        settings_hash = hashlib.sha256(settings.encode()).hexdigest()[:12]
        journal = _Journal(output.with_name(f".{output.name}.{settings_hash}.captions"))
        job = _CaptionJob(model, specs, journal, quarantine, model_name, batch_size)

        def add_row_error(error: DataError) -> None:
            quarantine.add(error.place, error)

        if jsonl_output.is_file_inside(output, source.path):
            # An earlier run wrote into the folder of images; there may be new images since, which
            # are read as well, so that they must not be reported as unread.
            on_error = None if source.strict else add_row_error
            records = source.read_silently(IgnoredData(), on_error=on_error)
            records = formats.append_unlisted_images(records, source.path, on_error=add_row_error)
            captioned = _require_all_records(output, job.add_captions(records))
        else:
            captioned = job.add_captions(source.read(on_error=add_row_error))
        stored = jsonl_output.stream_to_jsonl(captioned, output)
        num_records = sum(1 for _ in track_progress(stored, label=f"captioning {source.path.name}"))
        journal.path.unlink(missing_ok=True)
        return CaptionReport(
            records=num_records,
            short=job.num_captions["short"],
            long=job.num_captions["long"],
            generated=job.num_generated,
            empty=job.num_empty,
            dropped=quarantine.count,
            causes=quarantine.count_by_cause(),
        )


def _require_all_records(old: Path, records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records; raise DataError at the end if a record of the file `old` is missing.

    The file is about to be replaced, so a record that could not be read would be lost. Rows are
    counted at the start, by lines that are not empty, and records by their place.
    """
    with old.open("rb") as lines:
        num_rows = sum(bool(line.strip()) for line in lines)
    num_read = 0
    for record in records:
        place = record.place
        num_read += place is not None and Path(place.file).resolve() == old.resolve()
        yield record
    if num_read < num_rows:
        message = f"{num_rows - num_read} of its {num_rows} records cannot be used"
        message = f"{message} (see {quarantine_path(old)}), and would be lost"
        raise DataError(message, place=old, fix="Correct them, or write to another file")


def tidy_caption(text: str, *, max_sentences: int | None = None) -> str:
    """Return a generated text as whole sentences on one line; "" for one without text.

    White space is joined, and a quotation mark at the begin and one at the end are dropped if both
    are there. So is a last sentence without final mark, which the length limit cut, unless it is
    the only one.

    Args:
        max_sentences: number of sentences to keep, from the first; None keeps all.
    """
    text = text.strip()
    if len(text) > 1 and text[0] in "\"“'‘" and text[-1] in "\"”'’":
        text = text[1:-1]
    sentences = [" ".join(sentence.split()) for sentence in split_sentences(text)]
    final_marks = (".", "!", "?", "…", "。", "！", "？")
    if len(sentences) > 1 and not sentences[-1].rstrip("\"'”’)]").endswith(final_marks):
        sentences.pop()
    return " ".join(sentences[:max_sentences])


class _Journal:
    """Captions that a run has generated so far, one JSON line each.

    A batch is on the disk before the next one begins. A line that was cut by a killed process is
    ignored, and its caption generated again.
    """

    def __init__(self, path: Path):
        """Read the captions of an earlier run from `path`, if the file exists; it is not created.

        Broken lines are ignored; a JSON line without the keys of `add` raises KeyError.
        """
        self.path = path
        self.texts: dict[tuple[str, str], str] = {}
        """Text by kind of caption and key of the image."""
        for row in read_json_lines(path):
            self.texts[row["kind"], row["image"]] = row["text"]

    def add(self, kind: CaptionKind, texts: dict[str, str]) -> None:
        """Append captions, given by the key of their image, to `texts` and to the file.

        The file is created if it is missing, and flushed to the disk.
        """
        with open_for_append(self.path) as file:
            for key, text in texts.items():
                file.write(json.dumps({"kind": kind, "image": key, "text": text}) + "\n")
                self.texts[kind, key] = text
            file.flush()
            os.fsync(file.fileno())


@dataclass(slots=True)
class _CaptionJob:
    """Settings and counts of one run."""

    model: Captioner
    specs: Sequence[CaptionSpec]
    journal: _Journal
    quarantine: Quarantine
    model_name: str
    batch_size: int
    num_captions: Counter[CaptionKind] = field(default_factory=Counter)
    """Number of captions that were given to records, by kind."""
    num_generated: int = 0
    num_empty: int = 0

    def add_captions(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records in their order, with the captions that they lacked.

        Captions are generated in groups of `batch_size` records, and stored in the journal before
        any record of the group is yielded; counts are updated. Records that lack captions and have
        a broken image go to the quarantine instead; images of other records are not read. Groups
        are formed by position, so that a continued run makes the same batches as one without
        interruption.
        """
        group: list[tuple[Record, str]] = []  # with the key of the image, "" if not needed
        for record in records:
            try:
                key = ""
                if self._find_missing(record):
                    assert record.image is not None, "a pair has an image"
                    key = image_key(record.image)
                group.append((record, key))
            except DataError as error:
                self.quarantine.add(record, error)
            if len(group) == self.batch_size:
                yield from self._caption_group(group)
                group = []
        yield from self._caption_group(group)

    def _find_missing(self, record: Record) -> list[CaptionSpec]:
        """Return the requests for captions that a record lacks; [] if it is no pair."""
        if record.kind != "pair":
            return []
        return [spec for spec in self.specs if not getattr(record, spec.kind)]

    def _caption_group(self, group: Sequence[tuple[Record, str]]) -> Iterator[Record]:
        """Generate what is not in the journal and append it there, then yield the group's records.

        Equal images are captioned once. `num_generated` grows. Records whose image cannot be read
        go to the quarantine instead.

        Args:
            group: records with the key of their image, "" for those that lack no caption.
        """
        errors: dict[str, DataError] = {}  # by key of the image
        for spec in self.specs:
            images: dict[str, ImageRef] = {}
            for record, key in group:
                is_known = (spec.kind, key) in self.journal.texts or key in errors
                if spec in self._find_missing(record) and not is_known:
                    assert record.image is not None
                    images[key] = record.image
            texts = self._generate(images, spec, errors)
            if texts:
                self.journal.add(spec.kind, texts)
            self.num_generated += len(texts)
        for record, key in group:
            if key in errors:
                self.quarantine.add(record, errors[key])
            else:
                yield self._store_captions(record, key)

    def _generate(
        self, images: dict[str, ImageRef], spec: CaptionSpec, errors: dict[str, DataError]
    ) -> dict[str, str]:
        """Return the generated texts by key of the image, {} for no images.

        Images that raise DataError are missing there and added to `errors`; any other exception
        propagates.
        """

        def caption(keys: list[str]) -> list[str]:
            return self.model.caption_images(
                [images[key] for key in keys],
                prompt=spec.prompt,
                max_new_tokens=spec.max_new_tokens,
                batch_size=self.batch_size,
                num_drafts=spec.num_drafts,
            )

        keys = list(images)
        texts = bisect_failures(caption, keys, on_error=errors.__setitem__)
        return {key: text for key, text in zip(keys, texts, strict=True) if text is not None}

    def _store_captions(self, record: Record, key: str) -> Record:
        """Return a copy of the record with the captions that it lacked, from the journal.

        Their origin goes to ``metadata["captioned"]`` by kind, beside that of earlier captions. A
        caption without text after `tidy_caption` is left out and counted in `num_empty`, the others
        in `num_captions`; without any, the record itself is returned. Raises KeyError if the
        journal lacks a caption for `key`.
        """
        captions: dict[str, Any] = {}
        origins: dict[str, Any] = {}
        for spec in self._find_missing(record):
            max_sentences = 1 if spec.kind == "short" else None
            text = self.journal.texts[spec.kind, key]
            text = tidy_caption(text, max_sentences=max_sentences)
            if not text:
                self.num_empty += 1
                continue
            captions[spec.kind] = (text,) if spec.kind == "short" else text
            origins[spec.kind] = {
                "model": self.model_name,
                "fingerprint": self.model.fingerprint,
                "prompt": spec.prompt or "the model's own",
                "tokens": spec.max_new_tokens,
                "drafts": spec.num_drafts,
            }
            self.num_captions[spec.kind] += 1
        if not captions:
            return record
        earlier = record.metadata.get("captioned")
        if isinstance(earlier, dict):
            origins = earlier | origins
        metadata = {**record.metadata, "captioned": origins}
        return replace(record, **captions, metadata=metadata)
