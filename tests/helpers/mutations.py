"""Seeded mutations of files: of their bytes, and of the values in JSON and YAML."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

LITERALS = (
    "null", "true", "-1", "0", "1", "2.5", "1e400", "-1e308", "9" * 400, "NaN", "-Infinity",
    "9223372036854775808", '""', '"x"', '"\\ud800"', '"' + "y" * 5000 + '"', '"../../etc/passwd"',
    '"a\\u0000b"', "[]", "{}", "[[]]", '{"a": 1}', "[" * 200 + "]" * 200,
    '{"a":' * 200 + "1" + "}" * 200,
    "[1, 2, 3]", '["a", null]', '"\\u001b[31m"', "1e-320", "123456789012",
)  # fmt: skip
"""JSON texts that replace a value: other types, extreme numbers, odd texts, deep nesting."""

Mutate = Callable[[bytes, random.Random], bytes]


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change up to eight bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut_end(data: bytes, rng: random.Random) -> bytes:
    """Keep the first bytes only, perhaps none."""
    return data[: rng.randint(0, len(data))]


def delete_range(data: bytes, rng: random.Random) -> bytes:
    """Delete up to a third of the bytes at a random place."""
    start = rng.randint(0, len(data))
    return data[:start] + data[start + rng.randint(1, 1 + len(data) // 3) :]


def repeat_range(data: bytes, rng: random.Random) -> bytes:
    """Repeat up to 200 bytes a few times."""
    start = rng.randint(0, len(data))
    end = start + rng.randint(1, 200)
    return data[:end] + data[start:end] * rng.randint(1, 20) + data[end:]


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    """Insert invalid UTF-8, a byte order mark, or control characters, at the start or anywhere."""
    inserted = rng.choice(
        [b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\0", b"\xed\xa0\x80", b"\x1b[2J", b"\r", b"\n\n"]
    )
    position = rng.choice([0, rng.randint(0, len(data))])
    return data[:position] + inserted + data[position:]


BYTE_MUTATIONS: tuple[Mutate, ...] = (
    flip_bytes,
    cut_end,
    delete_range,
    repeat_range,
    insert_bytes,
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Apply one or two mutations of bytes."""
    for _ in range(rng.randint(1, 2)):
        data = rng.choice(BYTE_MUTATIONS)(data, rng)
    return data


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, delete, repeat or rename one value of a JSON text, or mutate its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    try:
        root = json.loads(data)
    except ValueError:
        return mutate_bytes(data, rng)
    mark = "@@mutated@@"
    containers = [c for c in _list_containers(root) if c]
    if not containers:
        return rng.choice(LITERALS).encode()
    container = rng.choice(containers)
    key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    literal = rng.choice(LITERALS)
    action = rng.choice(["replace", "replace", "replace", "delete", "repeat", "rename"])
    old = container[key]
    if action == "delete":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice(["", "x" * 300, "\u202e", f" {key}", str(key).upper()])] = old
        del container[key]
    elif action == "repeat" and isinstance(container, dict):
        container[key] = mark
        name = json.dumps(key)
        pair = f"{json.dumps(old)}, {name}: {literal}"
        return json.dumps(root).replace(f'"{mark}"', pair).encode()
    else:
        container[key] = mark
    return json.dumps(root).replace(f'"{mark}"', literal).encode()


def mutate_json_lines(data: bytes, rng: random.Random) -> bytes:
    """Mutate one line of a JSON Lines file as JSON, or the bytes of the file."""
    lines = data.splitlines(keepends=True)
    if not lines or rng.random() < 0.2:
        return mutate_bytes(data, rng)
    number = rng.randrange(len(lines))
    lines[number] = mutate_json(lines[number], rng) + b"\n"
    return b"".join(lines)


def mutate_text_values(data: bytes, rng: random.Random) -> bytes:
    """Replace the text behind a colon, comma or equals sign, or mutate the bytes."""
    positions = [i for i, byte in enumerate(data) if byte in b":,=\n"]
    if not positions or rng.random() < 0.4:
        return mutate_bytes(data, rng)
    start = rng.choice(positions) + 1
    ends = [i for i in positions if i >= start]
    end = ends[0] if ends else len(data)
    odd = ["&a [*a]", "*missing", "!!python/name:os.system", "|", "? a", "'", '"', "- - - -", "\t"]
    value = rng.choice([*LITERALS, *odd])
    return data[:start] + b" " + value.encode() + data[end:]


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mutate the JSON header of a safetensors file, keeping its length right, or the bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.3:
        head = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1])
        return struct.pack("<Q", head) + data[8:]
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    header = mutate_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def choose_mutation(name: str) -> Mutate:
    """Return the mutation that fits a file by the end of its name."""
    if name.endswith((".jsonl",)):
        return mutate_json_lines
    if name.endswith(".json"):
        return mutate_json
    if name.endswith((".yaml", ".csv", ".jinja", ".txt")):
        return mutate_text_values
    if name.endswith(".safetensors"):
        return mutate_safetensors
    return mutate_bytes


def _list_containers(value: Any) -> list[Any]:
    """Return all dicts and lists in a JSON value, itself included."""
    containers = []
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict | list):
            containers.append(item)
            stack.extend(item.values() if isinstance(item, dict) else item)
    return containers
