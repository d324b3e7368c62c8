"""The runner of the claims on a tiny model: results, resumption, refusals, plan, pilot and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helpers import tiny
from helpers.claims import claims
from vlduet.errors import ConfigError

NAMES = ("red", "green", "blue", "white", "black", "yellow", "pink", "grey")
TRACK = {
    "about": "Tiny pairs.",
    "preset": "vladva-nano",
    "steps": 2,
    "overrides": [
        "data.train=[{path: $data/stamps/train.jsonl}]",
        "data.validation=null",
        "model.path=$model",
        "train.batch_size=2",
        "model.head=linear",
        "model.dim=8",
    ],
    "measures": ["retrieval", "losses"],
}
COMPARISON = {
    "name": "text to image",
    "row": "joint",
    "against": "language only",
    "number": "text to image, hit@1",
    "margin": 1,
    "detectable": 5,
}
PROTOCOL = {
    "seeds": [0, 1],
    "min_seeds": 2,
    "core_minutes": 9,
    "pilots": {
        "pairs": {
            "row": "joint",
            "seeds": [7],
            "lengths": [1, 2, 3],
            "min_hits": 200,
            "min_nats": 50,
        }
    },
    "tracks": {"pairs": TRACK},
    "rows": {
        "base": {
            "about": "no training",
            "track": "pairs",
            "kind": "start",
            "minutes": 1,
            "measures": ["retrieval"],
        },
        "joint": {"about": "both losses", "track": "pairs", "minutes": 3},
        "language only": {
            "about": "one loss",
            "track": "pairs",
            "minutes": 2,
            "overrides": ["objectives={language: 1}"],
        },
    },
    "claims": [
        {
            "id": 6,
            "title": "Joint training",
            "statement": "S.",
            "paper": "P.",
            "protocol": "Q.",
            "comparisons": [COMPARISON],
        }
    ],
}


def write_data(folder: Path) -> None:
    """Write a corpus of coloured squares as stamps."""
    (folder / "stamps" / "images").mkdir(parents=True)
    for split, names in (("train", NAMES[:4]), ("val", NAMES[4:6]), ("test", NAMES[6:])):
        lines = []
        for index, name in enumerate(names):
            image = f"images/{split}-{index}.png"
            content = tiny.random_image(seed=10 * len(split) + index).data
            assert content is not None
            (folder / "stamps" / image).write_bytes(content)
            row = {"id": name, "image": image, "short": f"A {name} square."}
            lines.append(json.dumps(row) + "\n")
        (folder / "stamps" / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a study whose rows were all run, with the page in page.md."""
    folder = tmp_path_factory.mktemp("study")
    tiny.build_duet_model(folder / "model", family="qwen2_vl")
    write_data(folder / "data")
    (folder / "protocol.yaml").write_text(yaml.safe_dump(PROTOCOL, sort_keys=False))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(claims.rows, "prepare_corpora", lambda paths: None)
        monkeypatch.setattr(claims.pilot, "prepare_corpora", lambda paths: None)
        run_study(folder)
        run_study(folder, "--pilot", "pairs")
    return folder


def run_study(folder: Path, *arguments: str) -> None:
    """Run the study of a folder with further arguments."""
    paths = []
    for name in ("work", "data", "model", "minilm", "results"):
        paths += [f"--{name}", str(folder / name)]
    claims.run.main([*paths, "--protocol", str(folder / "protocol.yaml"), *arguments])


def read_row(folder: Path, name: str, seed: int) -> dict[str, object]:
    """Return the JSON file of a row and seed."""
    content: dict[str, object] = json.loads((folder / f"results/{name}.{seed}.json").read_text())
    return content


def test_every_row_and_seed_has_a_file_with_the_values_of_all_items(study: Path) -> None:
    names = {path.name for path in (study / "results").glob("*.json")}
    rows = {f"{name}.{seed}.json" for name in ("joint", "language-only") for seed in (0, 1)}
    assert names == {*rows, "base.0.json", "pilot-pairs.json"}
    result = claims.results.read_result(study / "results/joint.1.json")
    assert result.measures == ["retrieval", "losses"]
    assert len(result.numbers["text to image, hit@1"]["values"]) == 2
    assert set(result.numbers["image to text, hit@10"]["values"]) == {1}
    assert len(result.numbers["language loss, nats"]["values"]) == 2
    assert result.settings["config"]["seed"] == 1
    assert result.settings["config"]["model"]["path"] == "models/nano"
    assert str(study) not in json.dumps(result.settings)
    assert result.facts.keys() >= {"train_seconds", "measure_seconds", "machine", "commit"}


def test_finished_rows_are_skipped(study: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (study / "results").iterdir()}
    run_study(study)
    assert before == {path: path.stat().st_mtime_ns for path in (study / "results").iterdir()}


def test_a_new_group_of_measures_is_measured_without_training(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = json.loads(json.dumps(PROTOCOL))
    protocol["tracks"]["pairs"]["measures"].append("edits")
    path = study / "other.yaml"
    path.write_text(yaml.safe_dump(protocol, sort_keys=False))
    monkeypatch.setattr(claims.rows, "prepare_corpora", lambda paths: None)
    monkeypatch.setattr(claims.rows, "train", None)
    old = claims.results.read_result(study / "results/joint.0.json")
    run_study(study, "--protocol", str(path), "--rows", "joint", "--seeds", "0")
    new = claims.results.read_result(study / "results/joint.0.json")
    assert new.measures == [*old.measures, "edits"]
    assert old.numbers.items() <= new.numbers.items()
    assert new.facts["train_seconds"] == old.facts["train_seconds"]


def test_results_of_other_settings_are_refused(study: Path) -> None:
    protocol = json.loads(json.dumps(PROTOCOL))
    protocol["tracks"]["pairs"]["steps"] = 3
    path = study / "longer.yaml"
    path.write_text(yaml.safe_dump(protocol, sort_keys=False))
    with pytest.raises(ConfigError, match=r"config\.train\.steps is 2 in the file, and 3 now"):
        run_study(study, "--protocol", str(path), "--plan")


def test_the_plan_counts_what_is_left(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(study, "--results", str(tmp_path), "--rows", "joint", "--plan")
    assert "joint" in capsys.readouterr().out
    run_study(study, "--results", str(tmp_path), "--plan", "--seeds", "1")
    assert "5 minutes of one core left, of 9 in the protocol" in capsys.readouterr().out


def test_no_row_starts_that_would_end_after_the_limit(study: Path, tmp_path: Path) -> None:
    run_study(study, "--results", str(tmp_path), "--minutes", "0.5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--claims", "3"), ("--rows", "no"), ("--seeds", "9")])
def test_unknown_selections_are_refused(study: Path, arguments: tuple[str, str]) -> None:
    with pytest.raises(ConfigError):
        run_study(study, "--plan", *arguments)


def test_the_pilot_stops_at_the_first_length_without_a_gain(study: Path) -> None:
    content = json.loads((study / "results/pilot-pairs.json").read_text())
    assert list(content["lengths"]) == ["1", "2"]
    assert content["steps"] == 1
    assert content["lengths"]["1"][0].keys() == {"hit@10", "nats", "minutes"}


@pytest.mark.parametrize(
    ("hits", "nats", "expected"),
    [((40, 60, 61), (4.0, 3.5, 3.49), 2), ((40, 41), (4.0, 3.5), None), ((40, 60), (4, 4), None)],
)
def test_a_length_is_enough_if_its_successor_gains_little(
    hits: tuple[float, ...], nats: tuple[float, ...], expected: int | None
) -> None:
    pilot = claims.protocol.Pilot(
        row="joint", seeds=[1], lengths=[1, 2, 4], min_hits=2, min_nats=0.05
    )
    values = {
        length: [{"hit@10": hit, "nats": nat}]
        for length, hit, nat in zip((1, 2, 4), hits, nats, strict=False)
    }
    assert claims.pilot.choose_length(values, pilot) == expected


def test_the_page_has_verdict_rows_and_what_is_missing(study: Path, tmp_path: Path) -> None:
    protocol = str(study / "protocol.yaml")
    page = tmp_path / "page.md"
    for results in (study / "results", tmp_path / "empty"):
        arguments = ["--protocol", protocol, "--results", str(results), "--to", str(page)]
        claims.report.main(arguments)
        text = page.read_text()
        assert "## 6 Joint training" in text
        assert "cannot be decided here" in text
        if results.name == "results":
            assert "| joint: both losses | 2/2 |" in text
            assert "1 steps are enough" in text
        else:
            assert "Missing runs, about 10 minutes" in text
            assert "--claims 6" in text
