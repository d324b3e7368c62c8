"""The verbs, with a fake model behind them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from vlduet.cli import retrieval
from vlduet.encoders import dual
from vlduet.errors import RetrievalError
from vlduet.model.duet import DuetModel


@pytest.fixture
def run(monkeypatch: Any, model: Any, other_model: Any) -> Any:
    app = typer.Typer()
    retrieval.register(app)

    def opened(folder: Path) -> Any:
        return other_model if folder.name == "other" else model

    monkeypatch.setattr(dual, "open_embedder", opened)
    monkeypatch.setattr(DuetModel, "from_pretrained", opened)

    def invoke(*arguments: Any) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if isinstance(result.exception, Exception):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def folder(run: Any, pairs: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    result = run("index", tmp_path / "model", pairs, "--to", tmp_path / "index")
    assert result.stdout == f"{tmp_path / 'index'}: 4 documents (4 added)\n"
    return tmp_path / "index"


def test_index_again(run: Any, folder: Path, pairs: Path, tmp_path: Path) -> None:
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:-1]))
    (pairs.parent / "images" / "red.png").write_bytes(b"?")
    result = run("index", tmp_path / "model", pairs, "--to", folder)
    assert "2 kept" in result.stdout
    assert "1 left out: see" in result.stdout and "--prune removes them" in result.stdout
    found = json.loads(
        run("index", tmp_path / "model", pairs, "--to", folder, "--prune", "--json").stdout
    )
    assert {name: found[name] for name in ("removed", "kept", "count", "quarantined")} == {
        "removed": 2,
        "kept": 2,
        "count": 2,
        "quarantined": 1,
    }


def test_search(run: Any, folder: Path, tmp_path: Path, tools: Any) -> None:
    lines = run("search", folder, "red", "-k", 2).stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["red", "yellow"]
    assert lines[0].split("\t")[3] == "a red square" and lines[0].endswith("red.png")
    image = tools.paint(tmp_path / "q.png", (0, 0, 255))
    found = json.loads(
        run("search", folder, "--image", image, "--json", "--where", "year>2000").stdout
    )
    assert found["hits"][0]["id"] == "blue" and len(found["hits"]) == 3
    assert set(found["hits"][0]) == {"rank", "score", "id", "text", "image", "metadata"}
    found = json.loads(
        run(
            "search", folder, "x", "--where", "hue in red,blue", "--where", "warm=true", "--json"
        ).stdout
    )
    assert [hit["id"] for hit in found["hits"]] == ["red"]


def test_errors_reach_the_command_line(run: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="another"):
        run("search", folder, "red", "--model", tmp_path / "other")
    with pytest.raises(RetrievalError, match="empty query"):
        run("search", folder)
    (tmp_path / "model").rmdir()
    with pytest.raises(RetrievalError, match="--model DIR"):
        run("search", folder, "red")
    assert run("search", folder, "red", "--model", tmp_path).stdout


def test_ask(run: Any, folder: Path, model: Any) -> None:
    result = run("ask", folder, "red?", "-k", 1, "--where", "hue=red")
    assert result.stdout.startswith("An answer.\n\nSources:\n[1] red (")
    found = json.loads(run("ask", folder, "red?", "-k", 2, "--json").stdout)
    assert found["answer"] == "An answer." and [s["rank"] for s in found["sources"]] == [1, 2]
    assert "[references]" in found["prompt"] and len(model.asked) == 2


def test_encode(run: Any, pairs: Path, tmp_path: Path, tools: Any) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    tools.write_records(pairs, [*rows, {"id": "gone", "image": "gone.png", "short": "gone"}])
    out = tmp_path / "vectors.npz"
    result = run("encode", tmp_path, pairs, "--out", out)
    assert "4 vectors of 64 numbers" in result.stdout and "1 left out" in result.stdout
    with np.load(out) as arrays:
        assert arrays["ids"].tolist() == ["red", "green", "blue", "yellow"]
        np.testing.assert_allclose(np.linalg.norm(arrays["vectors"], axis=1), 1, rtol=1e-6)
    found = json.loads(
        run("encode", tmp_path, pairs, "--out", out, "--side", "text", "--json").stdout
    )
    assert found == {"out": str(out), "count": 5, "dim": 64, "quarantined": 0}
    with pytest.raises(RetrievalError, match="nothing to embed"):
        run("encode", tmp_path, tools.write_records(tmp_path / "none.jsonl", []), "--out", out)


def test_documents_cannot_steer_the_terminal(run: Any, tmp_path: Path, tools: Any) -> None:
    rows = [{"id": "\x1b[2J", "parts": [{"text": "a\tb\nc \x1b]0;x\x07"}]}]
    source = tools.write_records(tmp_path / "r.jsonl", rows)
    run("index", tmp_path, source, "--to", tmp_path / "index", "--side", "text")
    for result in (run("search", tmp_path / "index", "a"), run("ask", tmp_path / "index", "a")):
        assert "\x1b" not in result.stdout and "\x07" not in result.stdout
    assert len(run("search", tmp_path / "index", "a").stdout.split("\t")) == 5


def test_a_table_on_a_terminal(run: Any, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    retrieval.search(folder, "red", k=2)
    shown = capsys.readouterr().out
    assert "rank" in shown and "1.0" in shown and "red" in shown


def test_the_verbs_are_found_without_heavy_imports() -> None:
    code = "import sys, vlduet.cli.retrieval; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'lancedb', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
