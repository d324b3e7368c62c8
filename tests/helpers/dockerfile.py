"""Read a Dockerfile into its instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, such as ``RUN command``."""

    name: str
    """Name in upper case."""
    value: str
    """Text behind the name, with continued lines joined."""
    stage: int
    """Number of the FROM that it belongs to, from 0."""


def read_dockerfile(path: Path) -> list[Instruction]:
    """Return the instructions of a Dockerfile in order, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    instructions: list[Instruction] = []
    stage = -1
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name:
            stage += name.upper() == "FROM"
            instructions.append(Instruction(name.upper(), value.strip(), stage))
    return instructions
