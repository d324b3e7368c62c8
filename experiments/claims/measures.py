"""Groups of measures by their names in the protocol.

A group is a function of a `Subject` that returns named samples with the values of all items. A row
of the protocol lists the groups that it is measured by.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ability_measures import measure_abilities
from documents import measure_documents
from embedding_measures import (
    measure_edits,
    measure_minimal_pairs,
    measure_near_images,
    measure_retrieval,
    measure_scenes,
    measure_sequences,
)
from language_measures import (
    measure_captions,
    measure_choices,
    measure_losses,
    measure_places,
    measure_rag,
    measure_reading,
)
from subjects import Measurements, Subject

from vlduet.logs import logger

MEASURES: dict[str, Callable[[Subject], Measurements]] = {
    "retrieval": measure_retrieval,
    "captions": measure_captions,
    "edits": measure_edits,
    "choices": measure_choices,
    "minimal pairs": measure_minimal_pairs,
    "near images": measure_near_images,
    "scenes": measure_scenes,
    "sequences": measure_sequences,
    "documents": measure_documents,
    "places": measure_places,
    "questions": measure_rag,
    "reading": measure_reading,
    "losses": measure_losses,
    "abilities": measure_abilities,
}
"""Function of every group, by its name in the protocol."""


def measure_groups(subject: Subject, names: list[str]) -> Measurements:
    """Return the numbers of several groups, in order; KeyError for an unknown group.

    The seconds of every group, and those of the processor, are logged.
    """
    numbers: Measurements = {}
    for name in names:
        start, start_cpu = time.monotonic(), time.process_time()
        numbers |= MEASURES[name](subject)
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - start_cpu
        logger.info(f"measured {name} in {seconds:.0f} s ({cpu_seconds:.0f} s of the processor)")
    return numbers
