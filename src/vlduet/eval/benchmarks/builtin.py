"""Benchmarks of the held-out splits of the project's own corpora, which packages install.

They test retrieval and generation without any download by hand: captions, the next image of a
document, minimal pairs, questions by template, and a probe of positions. Options and distractors
are drawn with the run's seed. Nobody else reports these numbers; they compare checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlduet.data.formats import read_jsonl
from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Part, Parts, Record
from vlduet.errors import DataError
from vlduet.eval.benchmarks.compositional import decide_winoground
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.retrieval import make_caption_retrieval
from vlduet.eval.benchmarks.scores import BenchmarkScore, average
from vlduet.eval.benchmarks.tasks import (
    AnswerTask,
    AnswerTexts,
    ChoiceTask,
    PairItem,
    PairTask,
    Question,
    RetrievalTask,
)
from vlduet.eval.examples import evenly_spaced
from vlduet.eval.metrics import exact_match, token_f1, tokenize_answer

NUM_OPTIONS = 4
MAX_CONTEXT_PARTS = 6
"""Number of parts before an image of a document that form the query for it."""
NUM_PROBE_PROMPTS = 8
IMAGES_PER_PROMPT = 6
"""Number of captioned images in a prompt of the position probe."""
QUESTIONS_PER_KIND = 60
"""Maximum number of template questions of one kind; keeps the suite to minutes on a CPU."""


def read_split(files: OfficialFiles, corpus: str, *, split: str = "test") -> list[Record]:
    """Return the records of ``corpora/CORPUS/SPLIT.jsonl``, and store its hash in `files.hashes`.

    Raises:
        DataError: the file is missing, has a broken line, or contains no records.
    """
    name = f"corpora/{corpus}/{split}.jsonl"
    files.read_bytes(name)  # stores the hash
    path = files.find_path(name)
    records = list(read_jsonl(path))
    if not records:
        raise DataError("no records", place=path, fix=f"Run 'vlduet data fetch {corpus}' again")
    return records


def read_splits(files: OfficialFiles, corpora: Sequence[str]) -> list[Record]:
    """Return the test records of several corpora, in order; see `read_split`. None give []."""
    records = []
    for corpus in corpora:
        records += read_split(files, corpus)
    return records


def captioned_images(records: Sequence[Record]) -> list[tuple[Record, ImageRef]]:
    """Return the records with an image and a short caption, each with its image."""
    return [(record, record.image) for record in records if record.image and record.short]


# ------------------------------------------------------------------ embeddings


def load_captioned_images(
    files: OfficialFiles,
    *,
    corpora: Sequence[str],
    long_captions: bool = False,
    max_records: int | None = None,
) -> RetrievalTask:
    """Return the task of finding images by captions (``t2i``), and captions by images (``i2t``).

    Equal captions are one query with several correct images. Test records without an image, or
    whose first caption is missing or empty, are left out.

    Args:
        files: data folder; the hashes of the splits are stored in `files.hashes`.
        corpora: names of corpora that form one gallery.
        long_captions: use the long caption of a record instead of all its short ones.
        max_records: number of evenly spaced records to use; None uses all.

    Raises:
        DataError: a test split is missing, broken or empty, or no record remains.
    """
    images: list[ImageRef] = []
    captions: list[tuple[int, str]] = []
    records = read_splits(files, corpora)
    if max_records is not None:
        records = evenly_spaced(records, max_records)
    for record in records:
        texts = [record.long] if long_captions else list(record.short)
        if record.image is not None and texts and texts[0]:
            captions += [(len(images), text) for text in texts if text]
            images.append(record.image)
    return make_caption_retrieval(images, captions, merge_equal_captions=True)


def load_next_image(files: OfficialFiles, *, corpora: Sequence[str]) -> RetrievalTask:
    """Return the task of finding the next image of a document among all images of the corpora.

    A test document gives one query: its at most `MAX_CONTEXT_PARTS` parts before the last image
    that did not occur earlier in it. A document without such an image after its first part gives
    none. The gallery contains every image of the documents once, by content; the images in a query
    are excluded for it. File hashes are stored in `files.hashes`.

    Raises:
        DataError: a split is missing, broken or empty, or no document gives a query.
        ImageError: an image cannot be read.
    """
    index_of: dict[str, int] = {}
    gallery: list[Parts] = []
    queries: list[Parts] = []
    positives: list[tuple[int, ...]] = []
    excluded: list[tuple[int, ...]] = []
    for record in read_splits(files, corpora):
        keys: dict[int, str] = {}
        target = 0
        for n, part in enumerate(record.parts):
            if not isinstance(part, ImageRef):
                continue
            key = image_key(part)
            if key not in index_of:
                index_of[key] = len(gallery)
                gallery.append((part,))
            if n > 0 and key not in keys.values():
                target = n
            keys[n] = key
        if target == 0:
            continue
        start = max(0, target - MAX_CONTEXT_PARTS)
        queries.append(record.parts[start:target])
        positives.append((index_of[keys[target]],))
        excluded.append(tuple({index_of[key] for n, key in keys.items() if start <= n < target}))
    if not queries:
        message = "no document with an image after its beginning"
        raise DataError(message, place=files.root, fix="Fetch the corpora")
    return RetrievalTask(tuple(queries), tuple(gallery), tuple(positives), tuple(excluded))


def load_minimal_pairs(files: OfficialFiles, *, corpus: str, group_key: str = "") -> PairTask:
    """Return the task of telling two images apart whose captions differ in one word.

    Items are scored as Winoground's. The hash of the test split is stored in `files.hashes`.

    Args:
        files: data folder.
        corpus: name of the corpus.
        group_key: see `find_one_word_pairs`.

    Raises:
        DataError: the split is missing, broken or empty, or no two captions differ in one word.
    """
    items = find_one_word_pairs(read_split(files, corpus), group_key)
    if not items:
        message = "no two captions differ in one word"
        raise DataError(message, place=files.root, fix=f"Fetch {corpus}")
    return PairTask(tuple(items), decide_winoground)


def find_one_word_pairs(records: Sequence[Record], group_key: str) -> list[PairItem]:
    """Return an item for every two records whose first captions differ in one word, [] for none.

    Both records have the same vendor and the same value of the metadata key `group_key`; a key that
    no record has sets no condition. Captions are compared by `tokenize_answer` and
    `differ_in_one_word`. Records without an image or a short caption are left out, and so are names
    with a colon ("flag: Norway"), which share the word of their kind and nothing else.

    An item ``ID|OTHER_ID`` contains the two first captions and the two images in the order of the
    records. Its `group` is empty.
    """
    usable = []
    for record, image in captioned_images(records):
        if ":" not in record.short[0]:
            group = (record.metadata.get(group_key), record.metadata.get("vendor"))
            usable.append((record, image, group, tokenize_answer(record.short[0])))
    items = []
    for n, (record, image, group, words) in enumerate(usable):
        for other, other_image, other_group, other_words in usable[n + 1 :]:
            if group == other_group and differ_in_one_word(words, other_words):
                texts = (record.short[0], other.short[0])
                items.append(PairItem(f"{record.id}|{other.id}", texts, (image, other_image)))
    return items


def differ_in_one_word(words: Sequence[str], other_words: Sequence[str]) -> bool:
    """Return whether two captions of equal length differ in exactly one word, and share one."""
    if len(words) != len(other_words) or len(words) < 2:
        return False
    return sum(a != b for a, b in zip(words, other_words, strict=True)) == 1


# ------------------------------------------------------------------ generation


def load_template_questions(files: OfficialFiles) -> ChoiceTask:
    """Return questions about one image with up to four options, from the metadata of three corpora.

    The kinds are ``wesnoth race``, ``wesnoth alignment``, ``emoji group`` (OpenMoji only) and
    ``stamps category``. At most `QUESTIONS_PER_KIND` per kind, and their wrong options, are drawn
    with `files.seed`; a kind with a single value has no questions. Scores are broken down by the
    tag ``kind``, and the questions are asked without images too. File hashes are stored in
    `files.hashes`.

    Raises:
        DataError: a test split is missing, broken or empty.
        AssertionError: a drawn record has no image.
    """
    random = np.random.default_rng(files.seed)
    units = read_split(files, "wesnoth")
    races = [(r, str(r.metadata["race"])) for r in units if "race" in r.metadata]
    alignments = [(r, str(r.metadata["alignment"])) for r in units if "alignment" in r.metadata]
    emoji = [r for r in read_split(files, "emoji") if r.metadata["vendor"] == "openmoji"]
    groups = [(r, str(r.metadata["group"])) for r in emoji]
    stamps = read_split(files, "stamps")
    categories = [(r, r.metadata["category"].split("/")[0]) for r in stamps]
    selected: list[tuple[str, str, Record, str, list[str]]] = []
    for kind, question, answered in (
        ("wesnoth race", "Which race is this unit of?", races),
        ("wesnoth alignment", "Which alignment does this unit have?", alignments),
        ("emoji group", "What kind of thing is this?", groups),
        ("stamps category", "What kind of thing is this?", categories),
    ):
        values = sorted({value for _, value in answered})
        for n in sorted(random.permutation(len(answered))[:QUESTIONS_PER_KIND]):
            record, value = answered[n]
            selected.append((kind, question, record, value, values))
    items = []
    # The options are drawn after all questions: another order would draw others.
    for n, (kind, question, record, value, values) in enumerate(selected):
        options, index = draw_options(random, value, values)
        if len(options) > 1:
            assert record.image is not None
            prompt = (record.image, question)
            items.append(Question(f"{kind}/{n}", prompt, index, {"kind": kind}, options))
    return ChoiceTask(tuple(items), "kind", without_images_too=True)


def draw_options(
    random: np.random.Generator, correct: str, candidates: Sequence[str]
) -> tuple[tuple[str, ...], int]:
    """Draw the options of a question, up to three wrong ones and the correct one.

    Args:
        random: source of the draws.
        correct: the correct option.
        candidates: possible wrong options; may repeat and contain the correct one.

    Returns:
        At most `NUM_OPTIONS` distinct options in random order; the correct one alone if there is no
        other candidate.
        The index of the correct one.
    """
    wrong = sorted(set(candidates) - {correct})
    drawn = [wrong[i] for i in random.permutation(len(wrong))[: NUM_OPTIONS - 1]]
    index = int(random.integers(len(drawn) + 1))
    return (*drawn[:index], correct, *drawn[index:]), index


def load_captions(files: OfficialFiles, *, corpus: str) -> AnswerTask:
    """Return the task of captioning the test images of a corpus, prompted by the image alone.

    The references of an image are all its short captions; records without image or caption are left
    out. Answers have at most 24 tokens and are scored by `score_captions`. The file hash is stored
    in `files.hashes`; a missing or empty split raises DataError.
    """
    items = []
    for record, image in captioned_images(read_split(files, corpus)):
        items.append(Question(record.id, (image,), list(record.short), max_new_tokens=24))
    return AnswerTask(tuple(items), score_captions)


def score_captions(items: Sequence[Question], answers: AnswerTexts) -> BenchmarkScore:
    """Return word F1 (``token_F1``) and exact match (``exact``) with the best reference, x 100.

    A missing answer is an empty one. The detail ``distinct`` counts distinct captions: 1 for a
    model that says the same of all. No items raise AssertionError.
    """
    texts = [text or "" for text in answers]
    pairs = [(text, item.reference) for item, text in zip(items, texts, strict=True)]
    samples = {
        "token_F1": average([token_f1(text, references) for text, references in pairs]),
        "exact": average([exact_match(text, references) for text, references in pairs]),
    }
    distinct = {" ".join(tokenize_answer(text)) for text in texts}
    return BenchmarkScore(samples, details={"distinct": len(distinct)})


def load_caption_choice(files: OfficialFiles, *, corpus: str) -> ChoiceTask:
    """Return the task of choosing the caption of a test image among up to four.

    Every record with an image and a short caption is one question. The correct option is its first
    caption; the others, drawn with `files.seed`, are first captions of other records that differ in
    their normalized words. The file hash is stored in `files.hashes`; a missing or empty split
    raises DataError.
    """
    random = np.random.default_rng(files.seed)
    pairs = captioned_images(read_split(files, corpus))
    words_of = {r.short[0]: tokenize_answer(r.short[0]) for r, _ in pairs}
    items = []
    for record, image in pairs:
        caption = record.short[0]
        distractors = [text for text, words in words_of.items() if words != words_of[caption]]
        options, index = draw_options(random, caption, distractors)
        items.append(Question(record.id, (image,), index, {}, options))
    return ChoiceTask(tuple(items))


def load_position_probe(files: OfficialFiles) -> ChoiceTask:
    """Return the `make_position_questions` of the test split of stamps, scored by ``place``.

    They are asked without their images too, which shows only the preference for a caption or for
    its place. Errors are those of `read_split` and `make_position_questions`.
    """
    stamps = read_split(files, "stamps")
    items = make_position_questions(
        stamps, num_prompts=NUM_PROBE_PROMPTS, seed=files.seed, place=files.root
    )
    return ChoiceTask(tuple(items), "place", without_images_too=True)


def make_position_questions(
    records: Sequence[Record], *, num_prompts: int, seed: int, place: Path
) -> list[Question]:
    """Return questions which of six captions belongs to an image that is shown again.

    A prompt shows six images, each followed by its caption, and then one of them again. All six are
    asked about, so that each place is correct equally often. The options are the six captions in
    the order of the prompt; the tag ``place`` is "1" to "6". The accuracy by place shows whether
    the middle of a prompt is overlooked.

    Args:
        records: records; those without an image or a short caption are left out. Of equal first
            captions the last record counts.
        num_prompts: number of draws of six images; each gives six consecutive questions.
        seed: seed of the draws.
        place: place that an error names.

    Raises:
        DataError: fewer than six distinct captions.
    """
    random = np.random.default_rng(seed)
    pairs = list({record.short[0]: image for record, image in captioned_images(records)}.items())
    if len(pairs) < IMAGES_PER_PROMPT:
        message = f"only {len(pairs)} captions, {IMAGES_PER_PROMPT} needed"
        raise DataError(message, place=place, fix="Fetch stamps")
    items = []
    for n in range(num_prompts):
        drawn = [pairs[i] for i in random.permutation(len(pairs))[:IMAGES_PER_PROMPT]]
        captions = tuple(caption for caption, _ in drawn)
        context: list[Part] = []
        for caption, image in drawn:
            context += [image, f"This is: {caption}\n"]
        for index, (_, image) in enumerate(drawn):
            prompt = (*context, image, "What is this?")
            tags = {"place": str(index + 1)}
            items.append(Question(f"{n}/{index + 1}", prompt, index, tags, captions))
    return items
