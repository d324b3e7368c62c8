"""`vlduet eval` and `vlduet score` on miniature official files and a tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from helpers import official, tiny
from vlduet.cli.main import app
from vlduet.corpora import catalog
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders
from vlduet.encoders.loading import open_encoder
from vlduet.errors import ConfigError
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import SUITES, get_benchmark
from vlduet.model.feature_cache import FeatureCache

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.build_duet_model(root / "base").save_pretrained(root / "mine")
    return root / "mine"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.write_official_files(tmp_path_factory.mktemp("official"))


@pytest.fixture
def grader() -> Iterator[tuple[str, list[dict[str, object]]]]:
    """The URL of an OpenAI-compatible server that grades with 0.5, and the requests it received."""
    requests: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"content": "0.5 good"}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", requests
    server.shutdown()


def invoke(*arguments: object) -> Result:
    """Run a command and raise its errors."""
    return RUNNER.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_list_names_benchmarks_and_their_files() -> None:
    text = invoke("eval", "--list").stdout
    assert "coco: COCO 5k" in text and "coco/dataset_coco.json" in text
    benchmarks = json.loads(invoke("eval", "--list", "--json").stdout)
    assert benchmarks["pope"]["metric"] == "mean F1"
    assert benchmarks["pope"]["suite"] == "generative"


def test_stored_predictions_are_scored_as_at_the_evaluation(
    model: Path, data: Path, tmp_path: Path
) -> None:
    options = ["--data", data, "--to", tmp_path / "runs"]
    names = ["winoground", "seedbench_likelihood"]
    results = json.loads(invoke("eval", model, *names, *options, "--json").stdout)
    assert [score["benchmark"] for score in results["scores"]] == names
    assert results["scores"][0]["made_by"]["fingerprint"] and results["failed"] == {}
    again = json.loads(invoke("score", "winoground", *options, "--json").stdout)
    assert again["scores"][0]["values"] == results["scores"][0]["values"]
    assert "95 % interval" in invoke("score", "winoground", *options).stdout


def test_abilities_are_printed_as_a_table_and_saved_as_a_page(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmarks = tuple(get_benchmark(f"ability_{name}") for name in ("detail", "odd_one"))
    monkeypatch.setitem(SUITES, "abilities", benchmarks)
    monkeypatch.setattr(catalog, "fetch_corpus", lambda name, folder: None)
    command = ["eval", model, "winoground", "--suite", "abilities", "--data", data]
    result = invoke(*command, "--to", tmp_path / "runs")
    page = tmp_path / "runs/abilities.md"
    assert result.stdout.startswith("ability") and f"{page}\nwinoground (" in result.stdout
    assert page.read_text().startswith(f"# Abilities of {model}\n")
    other = tmp_path / "docs/page.md"
    options = ["--to", tmp_path / "runs", "--page", other, "--json"]
    scores = json.loads(invoke(*command, *options).stdout)["scores"]
    names = ["ability_detail", "ability_odd_one", "winoground"]
    assert [score["benchmark"] for score in scores] == names
    assert other.read_text() == page.read_text()


def test_benchmark_without_its_files_is_left_out(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "gqa").symlink_to(data / "gqa")
    result = invoke("eval", model, "winoground", "gqa", "--data", tmp_path, "--to", tmp_path / "x")
    assert result.exit_code == 1 and "winoground is left out" in result.stderr
    assert "gqa (" in result.stdout


def test_dual_encoder_is_evaluated_on_retrieval_and_pairs_only(data: Path, tmp_path: Path) -> None:
    frozen = tiny.build_frozen_encoders(tmp_path / "frozen")
    roles = {role: open_encoder(frozen[role]) for role in ("vision", "text")}
    torch.manual_seed(0)
    model = DualEncoder(FrozenEncoders(roles, cache=FeatureCache(None)), dim=8).eval()
    model.save_pretrained(tmp_path / "dual")
    supported = ["coco", "vist_5c4i", "winoground", "sugarcrepe"]
    unsupported = ["pope", "fvqa", "seedbench_likelihood"]
    options = ["--data", data, "--to", tmp_path / "runs", "--json"]
    result = invoke("eval", tmp_path / "dual", *supported, *unsupported, *options)
    assert result.exit_code == 1
    results = json.loads(result.stdout)
    assert [score["benchmark"] for score in results["scores"]] == supported
    for score in results["scores"]:
        assert score["made_by"]["fingerprint"] and score["missing"] == 0
    assert set(results["failed"]) == set(unsupported)
    for reason in results["failed"].values():
        assert "does not generate" in reason and "retrieval and pairs" in reason
    # The scored vectors are the model's own, and a mixture is the mean of its parts.
    vectors = np.fromfile(tmp_path / "runs/coco/vectors/documents.f32", dtype=np.float32)
    images = get_benchmark("coco").load(OfficialFiles(data)).documents  # type: ignore[union-attr]
    assert np.allclose(vectors.reshape(4, 8), model.encode(images), atol=1e-6)
    dataset = get_benchmark("vist_5c4i").load(OfficialFiles(data))
    mean = model.encode(list(dataset.queries[0])).mean(0)  # type: ignore[union-attr]
    vectors = np.fromfile(tmp_path / "runs/vist_5c4i/vectors/queries.f32", dtype=np.float32)
    assert np.allclose(vectors[:8], mean / np.linalg.norm(mean), atol=1e-6)


def test_answers_are_graded_by_an_llm_once_and_its_grades_can_be_reused(
    model: Path, data: Path, tmp_path: Path, grader: tuple[str, list[dict[str, object]]]
) -> None:
    url, requests = grader
    predictions = tmp_path / "results.json"
    predictions.write_text(json.dumps({"v1_0": "x = -1", "v1_1": "a cat"}))
    command = ["score", "mmvet", "--data", data, "--predictions", predictions, "--json"]
    result = invoke(*command, "--to", tmp_path / "runs", "--set", f"judge.url={url}")
    (score,) = json.loads(result.stdout)["scores"]
    assert score["values"]["total"]["mean"] == 50.0 and len(requests) == 2
    assert requests[0]["model"] == "gpt-4-0613"
    assert requests[0]["max_tokens"] == 3 and requests[0]["temperature"] == 0.0
    grades = {}
    for line in (tmp_path / "runs/mmvet/reviews.jsonl").read_text().splitlines():
        row = json.loads(line)
        grades[row["key"]] = {"content": [row["text"]]}
    (tmp_path / "grades.json").write_text(json.dumps(grades))
    result = invoke(*command, "--to", tmp_path / "other", "--reviews", tmp_path / "grades.json")
    (again,) = json.loads(result.stdout)["scores"]
    assert again["values"] == score["values"] and len(requests) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_wrong_arguments_are_refused_with_a_remedy(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke(*arguments)
