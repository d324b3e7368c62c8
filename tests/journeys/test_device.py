"""Every verb with its tensors on another device than the CPU's gives the CPU's numbers: a stand-in for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from helpers import official, runs, tiny
from vlduet.data.formats import read_records
from vlduet.logs import read_metrics

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE.parents[1] / "src", HERE.parent)))
MIXES = """
import torch, pretend
keep = pretend.start()
here, there = torch.ones(2), torch.ones(2, device=pretend.DEVICE)
assert (there * 2).cpu().tolist() == [2.0, 2.0] and there[torch.tensor([0])].tolist() == [1.0]
for wrong in (lambda: here + there, lambda: there.numpy(), lambda: torch.cat([there, here]), lambda: here[there.long()]):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("two devices were mixed")
"""

backends = pytest.importorskip("torch.utils.backend_registration")
pytestmark = pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends in Python",
)


def python(*words: str | Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-W", "ignore", *words], env=environment)


def files(folder: Path, family: str, *, half: bool) -> Path:
    """What `on_device.ROAD` reads."""
    runs.write_run_config(folder, family=family, count=8, steps=2, batch_size=4)
    if half:
        config = json.loads((folder / "base/config.json").read_text())
        (folder / "base/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        weights = folder / "base/model.safetensors"
        halved = {
            n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(weights).items()
        }
        save_file(halved, weights, metadata={"format": "pt"})
    official.write_official_files(folder / "official")
    tiny.build_frozen_encoders(folder / "judges")
    (folder / "photos").mkdir()
    for i, width in enumerate((16, 24, 40)):
        (folder / f"photos/{i}.png").write_bytes(tiny.random_image(i, width=width).data or b"")
    for i in range(4):
        parts = [
            {"image": f"{i}.png"},
            {"text": f"number {i}. And so on."},
            {"image": f"{i + 1}.png"},
        ]
        with (folder / "documents.jsonl").open("a") as file:
            file.write(json.dumps({"id": f"d{i}", "parts": parts}) + "\n")
    return folder


def vectors(folder: Path, name: str) -> np.ndarray:
    return np.asarray(np.load(folder / name)["vectors"])


def told(folder: Path, verb: str) -> Any:
    return json.loads((folder / f"{verb}.out").read_text())


def captions(folder: Path) -> list[tuple[str, ...]]:
    return [record.short for record in read_records(folder / "captions.jsonl")]


def losses(folder: Path, run: str) -> list[dict[str, float]]:
    rows = read_metrics(folder / run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_pretended_device_does_not_mix_with_the_cpu() -> None:
    assert python("-c", MIXES).wait(timeout=120) == 0


@pytest.mark.parametrize(("family", "half"), [("qwen2_vl", False), ("internvl", True)])
def test_every_verb_gives_the_numbers_of_the_cpu(tmp_path: Path, family: str, half: bool) -> None:
    here, there = (files(tmp_path / device, family, half=half) for device in ("cpu", "pretend"))
    running = [python(HERE / "on_device.py", folder.name, folder) for folder in (here, there)]
    assert [each.wait(timeout=300) for each in running] == [0, 0]

    # Half precision is the GPU's default for a checkpoint that was saved so, and never the CPU's.
    near, trained = (0.08, 0.05) if half else (1e-4, 5e-4)
    for name in ("vectors.npz", "merged.npz", "clip.npz"):
        np.testing.assert_allclose(
            vectors(there, name), vectors(here, name), atol=1e-4 if "clip" in name else near
        )
    for run in ("run", "sugar", "clip"):
        for on_cpu, found in zip(losses(here, run), losses(there, run), strict=True):
            # One rank or one end more or less is no rounding of a vector: 8 records have few of them.
            compared = {
                name for name in on_cpu if not (half and ("hit@" in name or "ended" in name))
            }
            close = 5e-4 if run == "clip" else trained
            assert {name: found[name] for name in compared} == pytest.approx(
                {name: on_cpu[name] for name in compared}, rel=close, abs=close
            ), run
            assert found.keys() == on_cpu.keys()
    made_by = told(there, "eval")["scores"][0]["made_by"]
    assert made_by["dtype"] == ("bfloat16" if half else "float32")
    np.testing.assert_allclose(
        told(there, "align")["cosines"], told(here, "align")["cosines"], atol=near
    )
    if not half:
        for verb, hits in (("search", "hits"), ("ask", "sources")):
            assert [hit["id"] for hit in told(there, verb)[hits]] == [
                hit["id"] for hit in told(here, verb)[hits]
            ]
        assert told(there, "ask")["answer"] == told(here, "ask")["answer"]
        assert captions(there) == captions(here)
        on_cpu, found = (
            {s["benchmark"]: s["values"] for s in told(at, "eval")["scores"]}
            for at in (here, there)
        )
        assert found == on_cpu and len(found) == 5
