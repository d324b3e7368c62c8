"""The demo's page, composed of what was measured, what was shown and what the run tells of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlduet.eval.protocols import (
    CaptionCrossEntropy,
    CaptionResult,
    ComposedRetrievalResult,
    RetrievalResult,
)
from vlduet.reports import galleries
from vlduet.reports.pages import (
    Alignment,
    Asked,
    Cost,
    DemoReport,
    Gallery,
    Heat,
    Provenance,
    RetrievalAugmented,
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one model does on the held-out records."""

    retrieval: RetrievalResult
    mixed: ComposedRetrievalResult
    entropy: CaptionCrossEntropy
    captions: CaptionResult
    """Of some held-out records after training; at its start, of those whose captions are shown."""
    known: frozenset[str]
    """Texts that a caption could be without being written: none of them a held-out one."""
    plain: float
    """Nats a token of plain answers, without an image."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that is compared."""

    untrained: RetrievalResult
    """The model's parts, with random weights where they meet."""
    start: Measurement
    """What training began with."""
    after: Measurement
    ridge: RetrievalResult


@dataclass(frozen=True, slots=True)
class Shown:
    """Examples of use."""

    album: galleries.Album
    galleries: tuple[Gallery, ...]
    heat: Heat
    asked: tuple[Asked, ...]
    alignments: tuple[Alignment, ...]
    augmented: RetrievalAugmented


@dataclass(frozen=True, slots=True)
class Told:
    """What the run tells of itself."""

    command: str
    seed: int
    facts: Mapping[str, str]
    seconds: Mapping[str, float]
    """By phase; `train` is among them, and `download` does not count as work."""
    data: tuple[Mapping[str, str], ...]
    metrics: Sequence[Mapping[str, float]]
    """The rows of ``metrics.jsonl``."""
    next_commands: tuple[str, ...]


def compose(measured: Measured, shown: Shown, *, told: Told) -> DemoReport:
    """Everything on the page."""
    start, after, seed = measured.start, measured.after, told.seed
    entropy = galleries.cross_entropy(start.entropy, after.entropy, seed=seed)
    result, ridge = after.retrieval, measured.ridge
    return DemoReport(
        model=galleries.row("VLDuet", "generates and embeds", result=result, seed=seed),
        ridge=galleries.row(
            "Ridge baseline", "frozen vision to MiniLM, mute", result=ridge, seed=seed
        ),
        start=galleries.row(
            "Start", "nano as it is shipped, before this run", result=start.retrieval, seed=seed
        ),
        untrained=galleries.row(
            "Untrained", "its parts, which never met", result=measured.untrained, seed=seed
        ),
        chance=galleries.chance_row(result),
        num_images=len(result.ids),
        num_captions=len(result.captions),
        gaps=galleries.gaps(result, ridge, seed=seed),
        cross_entropy=entropy,
        costs=(
            Cost(
                "Held-out captions",
                "after their image, nats a token",
                entropy.before.mean,
                entropy.after.mean,
            ),
            Cost(
                "Plain answers",
                "no image, nothing like it in training, nats a token",
                start.plain,
                after.plain,
            ),
        ),
        cost_note="Lower is better. A rise in the second row is what was forgotten while the model learned to look.",
        curves=galleries.curves(told.metrics),
        captioned=galleries.captioned(
            start.captions, after.captions, known=after.known, album=shown.album
        ),
        galleries=shown.galleries,
        mixed=galleries.mixed(start.mixed, after.mixed, seed=seed),
        heat=shown.heat,
        asked=shown.asked,
        alignments=shown.alignments,
        augmented=shown.augmented,
        provenance=Provenance(
            told.command, told.facts, told.seconds, told.data, notes=_notes(after, seed=seed)
        ),
        next_commands=told.next_commands,
        training_seconds=told.seconds["train"],
        minutes=sum(value for name, value in told.seconds.items() if name != "download") / 60,
    )


def _notes(after: Measurement, *, seed: int) -> tuple[str, ...]:
    f1 = after.captions.token_f1(seed)
    taken = sum(item.generated in after.known for item in after.captions.items)
    return (
        "Start is nano as it is shipped: its small trained part was made on the training splits of the same corpora and on "
        "class names (experiments/nano/README.md tells how). Untrained is the same model without that part.",
        "Left out of training: records whose caption names the same thing as a held-out or a validation caption.",
        "Captions: of several drafts from a beam search and the captions of the training stamps, which name no held-out "
        "thing, the one that the model's own embedding finds nearest to the image. "
        f"{taken} of {len(after.captions.items)} are of the training stamps.",
        f"{after.captions.num_distinct} distinct captions for {len(after.captions.items)} held-out images, evenly spaced; "
        f"word F1 with the reference {f1.mean:.2f} (95 % interval {f1.low:.2f} to {f1.high:.2f}).",
        "Examples are evenly spaced over the held-out records, and the questions are a fixed list.",
    )
