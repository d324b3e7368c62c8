"""`vlduet eval` and `vlduet score` as a user calls them, on official mini files and a tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers import official, tiny
from vlduet.cli.main import app
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders, open_encoder
from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.table import known
from vlduet.model.feature_cache import FeatureCache

RUN = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.build_duet_model(root / "base").save_pretrained(root / "mine")
    return root / "mine"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.write(tmp_path_factory.mktemp("official"))


@pytest.fixture
def judge() -> Iterator[tuple[str, list[dict[str, object]]]]:
    """An OpenAI-compatible address on this machine, and what it was asked."""
    asked: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"content": "0.5 good"}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_list() -> None:
    told = RUN.invoke(app, ["eval", "--list"], catch_exceptions=False).stdout
    assert "coco: COCO 5k" in told and "coco/dataset_coco.json" in told
    rows = json.loads(RUN.invoke(app, ["eval", "--list", "--json"], catch_exceptions=False).stdout)
    assert rows["pope"]["metric"] == "mean F1" and rows["pope"]["suite"] == "generative"


def test_eval_then_score_and_what_is_missing_costs_nothing_else(
    model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "official").symlink_to(data)
    base = ["--data", str(tmp_path / "official"), "--to", str(tmp_path / "runs"), "--json"]
    done = RUN.invoke(
        app,
        ["eval", str(model), "winoground", "seedbench_likelihood", *base],
        catch_exceptions=False,
    )
    found = json.loads(done.stdout)
    assert [score["benchmark"] for score in found["scores"]] == [
        "winoground",
        "seedbench_likelihood",
    ]
    assert found["scores"][0]["made_by"]["fingerprint"] and found["failed"] == {}
    again = RUN.invoke(app, ["score", "winoground", *base], catch_exceptions=False)
    assert json.loads(again.stdout)["scores"][0]["values"] == found["scores"][0]["values"]
    text = RUN.invoke(app, ["score", "winoground", *base[:-1]], catch_exceptions=False).stdout
    assert "95 % interval" in text
    partly = RUN.invoke(
        app,
        [
            "eval",
            str(model),
            "winoground",
            "gqa",
            "--data",
            str(tmp_path),
            "--to",
            str(tmp_path / "x"),
        ],
    )
    assert partly.exit_code == 1 and "winoground is left out" in partly.stderr


def test_a_dual_encoder_retrieves_and_tells_pairs_apart_and_is_not_asked_to_speak(
    data: Path, tmp_path: Path
) -> None:
    """What `recipe: clip` saves, through the command line."""
    frozen = tiny.build_frozen_encoders(tmp_path / "frozen")
    roles = {role: open_encoder(frozen[role]) for role in ("vision", "text")}
    torch.manual_seed(0)
    model = DualEncoder(FrozenEncoders(roles, cache=FeatureCache(None)), dim=8).eval()
    model.save_pretrained(tmp_path / "dual")
    words = [
        "eval",
        str(tmp_path / "dual"),
        "coco",
        "vist_5c4i",
        "winoground",
        "sugarcrepe",
        "pope",
        "fvqa",
    ]
    base = ["--data", str(data), "--to", str(tmp_path / "runs"), "--json"]
    done = RUN.invoke(app, [*words, "seedbench_likelihood", *base])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    scores = {score["benchmark"]: score for score in found["scores"]}
    assert list(scores) == ["coco", "vist_5c4i", "winoground", "sugarcrepe"]
    assert set(found["failed"]) == {"pope", "fvqa", "seedbench_likelihood"}
    assert all(
        "does not generate" in why and "retrieval and pairs" in why
        for why in found["failed"].values()
    )
    assert all(
        score["made_by"]["fingerprint"] and score["missing"] == 0 for score in scores.values()
    )
    # The vectors that were scored are the model's own, and a mixture is the mean of its parts.
    kept = np.fromfile(tmp_path / "runs/coco/vectors/documents.f32", dtype=np.float32).reshape(4, 8)
    images = known("coco").load(Source(data)).documents  # type: ignore[union-attr]
    assert np.allclose(kept, model.encode(images), atol=1e-6)
    query = known("vist_5c4i").load(Source(data)).queries[0]  # type: ignore[union-attr]
    mean = model.encode(list(query)).mean(0)
    first = np.fromfile(tmp_path / "runs/vist_5c4i/vectors/queries.f32", dtype=np.float32)[:8]
    assert np.allclose(first, mean / np.linalg.norm(mean), atol=1e-6)


def test_a_judge_at_an_address(
    model: Path, data: Path, tmp_path: Path, judge: tuple[str, list[dict[str, object]]]
) -> None:
    url, asked = judge
    predictions = tmp_path / "results.json"
    predictions.write_text(json.dumps({"v1_0": "x = -1", "v1_1": "a cat"}))
    base = ["score", "mmvet", "--data", str(data), "--to", str(tmp_path / "runs"), "--json"]
    first = RUN.invoke(
        app,
        [*base, "--predictions", str(predictions), "--set", f"judge.url={url}"],
        catch_exceptions=False,
    )
    (score,) = json.loads(first.stdout)["scores"]
    assert score["values"]["total"]["mean"] == 50.0 and len(asked) == 2
    assert (asked[0]["model"], asked[0]["max_tokens"], asked[0]["temperature"]) == (
        "gpt-4-0613",
        3,
        0.0,
    )
    # Stored reviews are scored without a judge.
    kept = tmp_path / "runs/mmvet/reviews.jsonl"
    grades = {
        row["key"]: {"content": [row["text"]]}
        for row in map(json.loads, kept.read_text().splitlines())
    }
    (tmp_path / "grades.json").write_text(json.dumps(grades))
    replayed = ["score", "mmvet", "--data", str(data), "--to", str(tmp_path / "other"), "--json"]
    replayed += ["--predictions", str(predictions), "--reviews", str(tmp_path / "grades.json")]
    (again,) = json.loads(RUN.invoke(app, replayed, catch_exceptions=False).stdout)["scores"]
    assert again["values"] == score["values"] and len(asked) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval"], "no model"),
        (["eval", "m"], "no benchmark"),
        (["eval", "m", "cocoo"], "Did you mean 'coco'"),
        (["eval", "m", "--suite", "generativ"], "Did you mean 'generative'"),
        (["eval", "m", "coco", "--set", "sead=1"], "Did you mean 'seed'"),
        (["eval", "m", "coco", "--set", "seed"], "Write key.subkey=value"),
        (["score", "pope", "mme", "--predictions", "x"], "Name the one"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RUN.invoke(app, words, catch_exceptions=False)
