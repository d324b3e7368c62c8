"""The steps of the Dockerfile, replayed in a clean folder, give a program that serves.

A Docker daemon is not needed: COPY and RUN are repeated with other paths and this Python. The index
of torch's builds is used if it can be reached, otherwise the one that pip is configured with.
"""

from __future__ import annotations

import os
import shutil
import sys
import urllib.request
from pathlib import Path

import pytest

from helpers.dockerfile import Instruction, read_dockerfile
from helpers.fake_embedder import write_pairs
from helpers.processes import run_process

ROOT = Path(__file__).parents[2]
MAX_STEP_SECONDS = 1500


def copy(instruction: Instruction, folder: Path) -> None:
    """Repeat a COPY from the build context."""
    *sources, target = instruction.value.split()
    for source in sources:
        path = folder / target
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, path, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            path.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, path)


def run(instruction: Instruction, folder: Path, environment: dict[str, str]) -> None:
    """Repeat a RUN with this Python, and with `folder` in the place of /opt."""
    command = instruction.value.replace("/opt/vlduet", str(folder / "venv"))
    if "TORCH_INDEX" not in environment:
        command = command.replace('--index-url "$TORCH_INDEX" ', "")
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin/python"
    python.unlink(missing_ok=True)
    python.symlink_to(sys.executable)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    process = run_process(
        ["bash", "-euc", command],
        cwd=folder / "src",
        env={**environment, "PATH": path},
        timeout=MAX_STEP_SECONDS,
    )
    assert process.returncode == 0, f"{command}\n{process.stdout[-2000:]}{process.stderr[-4000:]}"


def read_environment(instructions: list[Instruction]) -> dict[str, str]:
    """Return the variables of the build, without TORCH_INDEX if it cannot be reached."""
    names = ("HOME", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "SSL_CERT_FILE", "HTTPS_PROXY")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    for instruction in instructions:
        if instruction.name in ("ENV", "ARG"):
            for pair in instruction.value.split():
                name, _, value = pair.partition("=")
                environment[name] = value
    try:
        urllib.request.urlopen(environment["TORCH_INDEX"], timeout=10).close()
    except OSError:
        del environment["TORCH_INDEX"]
    return environment


def test_the_steps_of_the_build_give_a_program_that_starts(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    instructions = [i for i in read_dockerfile(ROOT / "Dockerfile") if i.stage == 0]
    environment = read_environment(instructions)
    (tmp_path / "src").mkdir()
    for instruction in instructions:
        if instruction.name == "COPY":
            copy(instruction, tmp_path / "src")
        elif instruction.name == "RUN":
            run(instruction, tmp_path, environment)
    shutil.rmtree(tmp_path / "src")  # the image has the environment alone
    program = tmp_path / "venv/bin/vlduet"
    model = request.config.getoption("--slow-model").resolve()
    pairs = write_pairs(tmp_path / "pairs")
    command = [program, "encode", model, pairs, "--out", tmp_path / "vectors.npz"]
    process = run_process(command, env={"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "vectors.npz").is_file()
    modules = "import fastapi, uvicorn, prometheus_client, lancedb, vlduet.serve.app"
    python = tmp_path / "venv/bin/python"
    run_process([python, "-c", modules], check=True)
