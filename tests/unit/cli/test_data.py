"""The commands of `vlduet data`, on tiny files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import pages
from helpers.tiny import random_image
from vlduet.cli.data import app
from vlduet.corpora import catalog
from vlduet.corpora.build import CorpusSummary
from vlduet.data.formats import FORMATS, read_records
from vlduet.data.readers.rows import IgnoredData
from vlduet.errors import ConfigError, DataError, PackageError

RUNNER = CliRunner()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write two good records with a broken line between them."""
    data = random_image().data
    assert data is not None
    (tmp_path / "a.png").write_bytes(data)
    lines = [
        '{"id": "a", "image": "a.png", "short": "A <red> cat."}',
        '{"id": ',
        '{"id": "b", "image": "a.png", "long": "Two."}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "x.jsonl"


def test_check_prints_problems_and_exits_with_1(source: Path) -> None:
    result = RUNNER.invoke(app, ["check", str(source)])
    assert result.exit_code == 1 and f"{source}:2: broken JSON" in result.stdout
    result = RUNNER.invoke(app, ["check", str(source), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["ok"] and report["files"][0]["records"] == 2
    assert report["problems"][0]["line"] == 2 and report["problems"][0]["fix"]


def test_check_of_a_good_folder_exits_with_0(source: Path) -> None:
    source.unlink()
    result = RUNNER.invoke(app, ["check", str(source.parent)])
    assert result.exit_code == 0 and "1 records" in result.stdout


def test_convert_leaves_broken_records_out_and_lists_them(source: Path) -> None:
    target = source.parent / "out" / "y.jsonl"
    result = RUNNER.invoke(app, ["convert", str(source), "--to", str(target), "--json"])
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)
    assert counts["records"] == 2 and counts["dropped"] == 1
    assert [r.id for r in read_records(target)] == ["a", "b"]
    assert "broken JSON" in (target.parent / "y.quarantine.jsonl").read_text()
    strict = RUNNER.invoke(app, ["convert", str(source), "--to", str(target), "--strict"])
    assert isinstance(strict.exception, DataError)
    assert [r.id for r in read_records(target)] == ["a", "b"], "a failed run leaves the old file"


def test_show_as_text_json_and_page(source: Path) -> None:
    result = RUNNER.invoke(app, ["show", str(source), "--index", "1"])
    assert result.exit_code == 0 and "Two." in result.stdout and "24 x 24" in result.stdout
    values = json.loads(RUNNER.invoke(app, ["show", str(source), "--json"]).stdout)
    assert values["kind"] == "pair" and values["record"]["short"] == "A <red> cat."
    page = source.parent / "page.html"
    assert RUNNER.invoke(app, ["show", str(source), "--html", str(page)]).exit_code == 0
    html = pages.parse_checked_page(page.read_text())
    alternatives = [attributes["alt"] for tag, attributes in html.tags if tag == "img"]
    image = str(source.parent / "a.png")
    assert alternatives == [image]
    assert f"{image}, 24 x 24" in html.text and "A <red> cat." in html.text
    beyond = RUNNER.invoke(app, ["show", str(source), "--index", "2"])
    assert isinstance(beyond.exception, DataError) and "Use 0 to 1" in str(beyond.exception)


def test_fetch_continues_without_a_corpus_that_is_not_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch_corpus(name: str, to: Path) -> CorpusSummary:
        if name != "emoji":
            raise PackageError(f"{name} needs apt")
        counts = {"train": 2, "val": 1, "test": 1}
        return CorpusSummary(name, to / name, counts, 4, "CC BY-SA 4.0", False)

    monkeypatch.setattr(catalog, "fetch_corpus", fetch_corpus)
    result = RUNNER.invoke(app, ["fetch", "stamps", "emoji", "--to", str(tmp_path), "--json"])
    values = json.loads(result.stdout)
    assert result.exit_code == 0 and values["fetched"][0]["counts"]["train"] == 2
    assert values["failed"] == {"stamps": "stamps needs apt"}
    assert RUNNER.invoke(app, ["fetch", "stamps", "--to", str(tmp_path)]).exit_code == 1


def test_fetch_refuses_a_misspelt_name_before_the_first_download(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["fetch", "emoji", "stamp", "--to", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "Did you mean 'stamps'?" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_formats_and_corpora_are_listed() -> None:
    formats = RUNNER.invoke(app, ["formats"]).stdout
    assert [name for name in FORMATS if name not in formats] == []
    corpora = json.loads(RUNNER.invoke(app, ["corpora", "--json"]).stdout)
    assert {"emoji", "stamps"} <= corpora.keys()
    assert all(corpus["licence"] for corpus in corpora.values())


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """Write a table of 20 products, whose images are in another folder."""
    lines = ["filename,name_en,price"]
    (tmp_path / "photos").mkdir()
    for i in range(20):
        data = random_image(i).data
        assert data is not None
        (tmp_path / "photos" / f"{i}.png").write_bytes(data)
        lines.append(f"{i}.png,product number {i},{i}.5")
    (tmp_path / "products.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "products.csv"


def test_split_reads_a_table_with_the_options_of_every_source(products: Path) -> None:
    folder = products.parent / "splits"
    options = ["--root", str(products.parent / "photos"), "--columns", "caption=name_en"]
    command = ["split", str(products), "--to", str(folder), *options]
    result = RUNNER.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"{folder / 'train.jsonl'}: 16 records in 16 groups" in result.stdout
    shares = ["--shares", "train=.5, dev=.5", "--seed", "3", "--json"]
    report = json.loads(RUNNER.invoke(app, [*command, *shares]).stdout)
    assert report["records"] == {"train": 10, "dev": 10} and report["dropped"] == 0
    files = list(report["files"].values())
    checked = RUNNER.invoke(app, ["check", *files])
    assert checked.exit_code == 0 and checked.stdout.endswith("0 errors, 0 warnings\n")
    assert all(record.short for file in files for record in read_records(Path(file)))


@pytest.mark.parametrize("shares", ["train", "train=x,test=.5", "a=.5,a=.5", "a=.5,b=.6", ""])
def test_split_refuses_shares_that_are_not_valid(products: Path, shares: str) -> None:
    command = ["split", str(products), "--to", str(products.parent / "out"), "--shares", shares]
    result = RUNNER.invoke(app, command)
    assert isinstance(result.exception, ConfigError) and "--shares" in str(result.exception)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["caption"], "Write ROLE=COLUMN"),
        (["=name_en"], "Write ROLE=COLUMN"),
        (["caption=a", "caption=b"], "two columns for 'caption'"),
    ],
)
def test_columns_that_are_not_valid_are_refused(
    products: Path, columns: list[str], message: str
) -> None:
    options = [word for text in columns for word in ("--columns", text)]
    result = RUNNER.invoke(app, ["check", str(products), *options])
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_strict_turns_what_is_not_read_into_an_error(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text("".join(source.read_text().splitlines(keepends=True)[::2]))
    monkeypatch.setattr(IgnoredData, "__bool__", lambda self: True)
    monkeypatch.setattr(IgnoredData, "messages", lambda self, **_: ["2 rows with a column `x`"])
    assert RUNNER.invoke(app, ["check", str(source)]).exit_code == 0
    result = RUNNER.invoke(app, ["check", str(source), "--strict"])
    assert result.exit_code == 1 and "error: " in result.stdout and "`x`" in result.stdout
    target = source.parent / "out.jsonl"
    result = RUNNER.invoke(app, ["convert", str(source), "--to", str(target), "--strict"])
    assert isinstance(result.exception, DataError) and "`x`" in str(result.exception)
    assert not target.exists()
    assert RUNNER.invoke(app, ["convert", str(source), "--to", str(target)]).exit_code == 0


@pytest.mark.parametrize("name", ["Products 2024.xlsx", "old.XLS", "free.ods"])
def test_a_spreadsheet_must_be_saved_as_csv(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4")
    result = RUNNER.invoke(app, ["check", str(tmp_path / name)])
    assert isinstance(result.exception, DataError)
    assert f"Save the sheet as {Path(name).stem}.csv" in str(result.exception)
