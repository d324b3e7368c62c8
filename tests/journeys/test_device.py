"""Every command, with its tensors on a device other than the CPU, gives the CPU's numbers.

The pretended device stands in for a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from helpers import official, runs, tiny
from helpers.processes import MAX_SECONDS, start_process
from vlduet.data.formats import read_records
from vlduet.logs import read_metrics

FOLDER = Path(__file__).parent
PYTHON_PATH = os.pathsep.join(map(str, (FOLDER.parents[1] / "src", FOLDER.parent)))
MIX_DEVICES = """
import torch
from helpers import pretend_device

registration = pretend_device.register_device()
cpu, pretended = torch.ones(2), torch.ones(2, device=pretend_device.DEVICE)
assert (pretended * 2).cpu().tolist() == [2.0, 2.0]
assert pretended[torch.tensor([0])].tolist() == [1.0]
for mix in (
    lambda: cpu + pretended,
    lambda: pretended.numpy(),
    lambda: torch.cat([pretended, cpu]),
    lambda: cpu[pretended.long()],
):
    try:
        mix()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("two devices were mixed")
"""

backends = pytest.importorskip("torch.utils.backend_registration")
pytestmark = pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends in Python",
)


def start_python(*arguments: str | Path) -> AbstractContextManager[Popen[Any]]:
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    return start_process([sys.executable, "-W", "ignore", *arguments], env=environment)


def write_inputs(folder: Path, family: str, *, half_precision: bool) -> Path:
    """Write everything that the commands of on_device.py read, and return the folder."""
    runs.write_run_config(folder, family=family, count=8, steps=2, batch_size=4)
    if half_precision:
        config_path = folder / "base" / "config.json"
        config = json.loads(config_path.read_text()) | {"dtype": "bfloat16"}
        config_path.write_text(json.dumps(config))
        weights_path = folder / "base" / "model.safetensors"
        weights = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(weights_path).items()
        }
        save_file(weights, weights_path, metadata={"format": "pt"})
    official.write_official_files(folder / "official")
    tiny.build_frozen_encoders(folder / "encoders")
    (folder / "photos").mkdir()
    for i, width in enumerate((16, 24, 40)):
        image = tiny.random_image(i, width=width)
        (folder / "photos" / f"{i}.png").write_bytes(image.data or b"")
    documents = []
    for i in range(4):
        text = {"text": f"number {i}. And so on."}
        parts = [{"image": f"{i}.png"}, text, {"image": f"{i + 1}.png"}]
        documents.append({"id": f"d{i}", "parts": parts})
    runs.write_rows(folder / "documents.jsonl", documents)
    return folder


class Outputs:
    """Results of all commands on one device."""

    def __init__(self, folder: Path):
        self.folder = folder

    def json(self, command: str) -> Any:
        return json.loads((self.folder / f"{command}.out").read_text())

    def vectors(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.folder / name)["vectors"])

    def captions(self) -> list[tuple[str, ...]]:
        return [record.short for record in read_records(self.folder / "captions.jsonl")]

    def metrics(self, run: str) -> list[dict[str, float]]:
        rows = read_metrics(self.folder / run / "metrics.jsonl")
        for row in rows:
            row.pop("seconds", None)
        return rows

    def benchmark_values(self) -> dict[str, Any]:
        return {score["benchmark"]: score["values"] for score in self.json("eval")["scores"]}


def test_the_pretended_device_does_not_mix_with_the_cpu() -> None:
    with start_python("-c", MIX_DEVICES) as process:
        assert process.wait(timeout=MAX_SECONDS) == 0


@pytest.mark.parametrize(("family", "half_precision"), [("qwen2_vl", False), ("internvl", True)])
def test_every_command_gives_the_numbers_of_the_cpu(
    tmp_path: Path, family: str, half_precision: bool
) -> None:
    """Checkpoints saved in half precision are opened so on a GPU, and in float32 on a CPU."""
    with ExitStack() as stack:
        processes = []
        for device in ("cpu", "pretend"):
            folder = write_inputs(tmp_path / device, family, half_precision=half_precision)
            process = start_python(FOLDER / "on_device.py", device, folder)
            processes.append(stack.enter_context(process))
        assert [process.wait(timeout=MAX_SECONDS) for process in processes] == [0, 0]
    expected, outputs = Outputs(tmp_path / "cpu"), Outputs(tmp_path / "pretend")

    vector_tolerance = 0.08 if half_precision else 1e-4
    for name in ("vectors.npz", "merged.npz"):
        np.testing.assert_allclose(
            outputs.vectors(name), expected.vectors(name), atol=vector_tolerance
        )
    # Dual encoders always have float32.
    np.testing.assert_allclose(outputs.vectors("clip.npz"), expected.vectors("clip.npz"), atol=1e-4)
    np.testing.assert_allclose(
        outputs.json("align")["cosines"], expected.json("align")["cosines"], atol=vector_tolerance
    )
    for run in ("run", "sugar", "clip"):
        tolerance = 0.05 if half_precision and run != "clip" else 5e-4
        check_metrics(
            outputs.metrics(run),
            expected.metrics(run),
            tolerance=tolerance,
            skips_counts=half_precision,
        )
    (first_score, *_) = outputs.json("eval")["scores"]
    assert first_score["made_by"]["dtype"] == ("bfloat16" if half_precision else "float32")
    if not half_precision:
        check_equal_results(outputs, expected)


def check_metrics(
    metrics: list[dict[str, float]],
    expected: list[dict[str, float]],
    *,
    tolerance: float,
    skips_counts: bool,
) -> None:
    """Compare metrics; with `skips_counts` without shares of a few records.

    Rounding changes the rank of one of 8 records, or the end of a caption, by much more than a
    tolerance.
    """
    for row, expected_row in zip(metrics, expected, strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in expected_row.items():
            if skips_counts and ("hit@" in name or "ended" in name):
                continue
            assert row[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def check_equal_results(outputs: Outputs, expected: Outputs) -> None:
    """Compare hits, answers, captions and benchmark scores, which are equal in float32."""
    for command, key in (("search", "hits"), ("ask", "sources")):
        ids = [hit["id"] for hit in outputs.json(command)[key]]
        assert ids == [hit["id"] for hit in expected.json(command)[key]]
    assert outputs.json("ask")["answer"] == expected.json("ask")["answer"]
    assert outputs.captions() == expected.captions()
    values = outputs.benchmark_values()
    assert values == expected.benchmark_values() and len(values) == 5
