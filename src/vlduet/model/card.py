"""Model card: the README.md of a model folder, which says how the model was trained.

It also says at which positions embeddings were trained. Every hidden state at the end of a sentence
can be read as an embedding of what precedes it, but only training makes it a good one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlduet.errors import ModelError
from vlduet.logs import strip_control_characters
from vlduet.structured_files import check_fields

CARD_NAME = "README.md"
"""File of the card in a model folder. The manifest does not list it: it may be edited."""
POSITIONS_KEY = "slice_positions"
"""Key of a model's provenance: in which of `SLICE_POSITIONS` embeddings were trained."""
SLICE_POSITIONS = {"answers": "chat", "documents": "interleaved"}
"""Texts at the ends of whose slices embeddings can be trained -> the kind of their records."""
TRAINING_FIELDS = {
    "config.recipe.name": str,
    "config.objectives": dict,
    "config.train.batch_size": int,
    "steps": int,
    "records": list,
}
"""Keys of the provenance that a training run writes, as far as a card needs them."""

TEMPLATE = """\
---
library_name: vlduet
{front}---

# Model of VLDuet

A vision-language model that generates text, and embeds texts, images and sequences of both with the
same weights. Written by VLDuet {version}; all settings are in `vlduet.json`.

| | |
|---|---|
{rows}

## Positions of trained embeddings

{positions}

## Use

```python
from vlduet import DuetModel

model = DuetModel.from_pretrained("THIS_FOLDER")
vectors = model.encode(["a red boat", "a lake at night"])
```
"""


def find_slice_positions(provenance: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return in which of `SLICE_POSITIONS` embeddings at the ends of slices were trained.

    Args:
        provenance: provenance of a model folder.

    Returns:
        Those of the last training run; () for one that trained none, and None where this is not
        recorded: for a checkpoint, a published model, or a run of an earlier version with the loss
        `structure`, whose records are not known.
    """
    positions = provenance.get(POSITIONS_KEY)
    if isinstance(positions, list):
        return tuple(name for name in SLICE_POSITIONS if name in positions)
    if not _has_training(provenance) or provenance["config"]["objectives"].get("structure"):
        return None
    return ()


def _has_training(provenance: Mapping[str, Any]) -> bool:
    """Return whether a provenance is that of a training run; that of a foreign file may not be."""
    try:
        check_fields(
            dict(provenance), TRAINING_FIELDS, place=POSITIONS_KEY, error_class=ModelError, fix=""
        )
    except ModelError:
        return False
    return True


def describe_slice_positions(positions: tuple[str, ...] | None) -> str:
    """Return a sentence about the result of `find_slice_positions`."""
    if positions is None:
        return "It is not recorded whether embeddings inside answers or documents were trained."
    if not positions:
        return (
            "Embeddings were trained where a whole content ends. Those at the ends of sentences "
            "inside answers, by which images are retrieved while the model writes, were not "
            "trained."
        )
    where = f"Embeddings were trained at the ends of slices inside {' and '.join(positions)}"
    if "answers" in positions:
        return f"{where}, so that images can be retrieved while the model writes."
    return f"{where}. Those inside answers were not trained."


def format_card(manifest: Mapping[str, Any]) -> str:
    """Return the card of a model as Markdown, from its manifest.

    Paths of the training data are left out, because a card is made to be published.
    """
    provenance = manifest.get("provenance", {})
    base_name = manifest.get("base_name")
    head = manifest["head"]
    rows = {
        "Base": base_name or ("this folder" if manifest["base"] == "." else "a local checkpoint"),
        "Embedding": f"{head['dim']} numbers, head `{head['kind']}`",
    }
    if _has_training(provenance):
        config = provenance["config"]
        losses = [f"{name} {weight}" for name, weight in config["objectives"].items() if weight]
        counts = " + ".join(map(str, provenance["records"]))
        rows["Recipe"] = f"`{config['recipe']['name']}`, with the losses {', '.join(losses)}"
        batch_size = config["train"]["batch_size"]
        rows["Training"] = f"{provenance['steps']} steps of {batch_size} of {counts} records"
    return TEMPLATE.format(
        front=f"base_model: {base_name.partition('@')[0]}\n" if base_name else "",
        version=manifest["vlduet"],
        rows="\n".join(
            f"| {name} | {strip_control_characters(value).replace('|', ' ')} |"
            for name, value in rows.items()
        ),
        positions=describe_slice_positions(find_slice_positions(provenance)),
    )
