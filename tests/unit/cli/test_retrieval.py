"""`vlduet index`, `search`, `ask` and `encode` with a fake model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from helpers import tiny
from helpers.command_line import invoke
from helpers.fake_embedder import COLOURS, FakeModel, paint, write_pairs, write_records
from vlduet.cli.main import app
from vlduet.data.quarantine import quarantine_path
from vlduet.data.records import ImageRef, Message
from vlduet.encoders import dual
from vlduet.errors import DataError, RetrievalError
from vlduet.model.duet import DuetModel

Run = Callable[..., Result]


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, model: FakeModel) -> Run:
    """Run a command; a model folder named "other" opens another model. Raises its errors."""

    def open_model(folder: Path, **options: Any) -> FakeModel:
        return FakeModel("another") if folder.name == "other" else model

    monkeypatch.setattr(dual, "open_embedder", open_model)
    monkeypatch.setattr(DuetModel, "from_pretrained", open_model)

    return invoke


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "source")


@pytest.fixture
def folder(run: Run, pairs: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    result = run("index", tmp_path / "model", pairs, "--to", tmp_path / "index")
    assert result.stdout == f"{tmp_path / 'index'}: 4 documents (4 added)\n"
    return tmp_path / "index"


def test_index_is_updated_and_pruned(run: Run, folder: Path, pairs: Path, tmp_path: Path) -> None:
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:-1]))
    image = pairs.parent / "images" / "red.png"
    data = image.read_bytes()
    image.write_bytes(b"?")
    command = ["index", tmp_path / "model", pairs, "--to", folder]
    text = run(*command).stdout
    assert "2 kept" in text and "1 left out (1 x the image is an unknown kind of file" in text
    assert "1 of these were indexed before, and stay as they were" in text
    assert "1 more were not in what could be read of the source" in text
    with pytest.raises(RetrievalError, match="cannot be read"):
        run(*command, "--prune")
    image.write_bytes(data)
    assert "1 are no longer in the source: --prune removes them" in run(*command).stdout
    report = json.loads(run(*command, "--prune", "--json").stdout)
    expected = {"removed": 1, "kept": 3, "count": 3, "quarantined": 0}
    assert {name: report[name] for name in expected} == expected


def test_a_source_of_which_nothing_can_be_indexed_is_a_failure(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    rows = [{"id": name, "image": f"{name}.png", "short": "A."} for name in ("gone", "gone2")]
    source = write_records(tmp_path / "r.jsonl", rows)
    for to, count in ((tmp_path / "new", 0), (folder, 4)):
        result = run("index", tmp_path / "model", source, "--to", to)
        assert result.exit_code == 1
        assert f"{to}: {count} documents (nothing in {source} could be indexed)" in result.stdout
        assert "2 left out (2 x no such image): see" in result.stdout
    result = run("index", tmp_path / "model", source, "--to", tmp_path / "new", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["quarantined"] == 2
    with pytest.raises(RetrievalError, match="nothing to embed"):
        run("encode", tmp_path / "model", source, "--out", tmp_path / "v.npz")


def test_files_that_are_not_read_are_part_of_the_summary(run: Run, tmp_path: Path) -> None:
    photos, to = tmp_path / "photos", tmp_path / "index"
    paint(photos / "a.png", (0, 0, 0))
    paint(photos / "#recycle" / "b.png", (0, 0, 0))
    (photos / "c.mov").write_bytes(b"?")
    command = ["index", tmp_path / "model", photos, "--to", to]
    assert run(*command).stdout == (
        f"{to}: 1 documents (1 added)\n"
        "1 file is not read: 1 .mov (c.mov)\n"
        "1 hidden file, thumbnail or recycle bin, left out: #recycle\n"
    )
    report = json.loads(run(*command, "--rehash", "--json").stdout)
    assert (report["kept"], report["unread"], report["system_files"]) == (
        1,
        {".mov": 1},
        {"#recycle": 1},
    )
    paint(tmp_path / "more" / "a.png", (1, 1, 1))
    command[2] = tmp_path / "more"
    with pytest.raises(RetrievalError, match="a document has the id of a document of"):
        run(*command)
    assert "1 updated" in run(*command, "--force").stdout
    result = run("encode", tmp_path / "model", photos, "--out", tmp_path / "v.npz")
    assert "1 file is not read: 1 .mov (c.mov)" in result.stdout
    result = run("encode", tmp_path / "model", photos, "--out", tmp_path / "v.npz", "--json")
    assert json.loads(result.stdout)["unread"] == {".mov": 1}


def test_search_by_text_image_and_filters(run: Run, folder: Path, tmp_path: Path) -> None:
    lines = run("search", folder, "red", "-k", 2).stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["red", "yellow"]
    assert lines[0].split("\t")[3] == "a red square" and lines[0].endswith("red.png")
    image = paint(tmp_path / "q.png", (0, 0, 255))
    result = run("search", folder, "--image", image, "--json", "--where", "year>2000")
    hits = json.loads(result.stdout)["hits"]
    assert hits[0]["id"] == "blue" and len(hits) == 3
    assert set(hits[0]) == {"rank", "score", "id", "text", "image", "metadata"}
    filters = ["--where", "hue in red,blue", "--where", "warm=true"]
    hits = json.loads(run("search", folder, "x", *filters, "--json").stdout)["hits"]
    assert [hit["id"] for hit in hits] == ["red"]


def test_parts_of_a_query_keep_the_order_of_the_command_line(
    run: Run, folder: Path, model: FakeModel, tmp_path: Path
) -> None:
    red, blue = (paint(tmp_path / f"{name}.png", COLOURS[name]) for name in ("red", "blue"))
    images = ImageRef(path=red), ImageRef(path=blue)
    options = ["--image", red, "--text=and", "-k", 1, "--text", "--like", f"--image={blue}"]
    run("search", folder, *options)
    assert model.queries.pop() == (images[0], "and", "--like", images[1])
    run("search", folder, "--image", red, "last", "--image", blue, "--text", "third")
    assert model.queries.pop() == (*images, "third", "last")
    run("ask", folder, "--text", "first?", "--image", red, "--image", blue, "-k", 1)
    assert model.queries.pop() == ("first?", *images)
    assert model.conversations[-1][0].parts[-3:] == ("first?", *images)
    with pytest.raises(RetrievalError, match="an empty question"):
        run("ask", folder, "--image", red)


def test_a_file_may_hold_the_query(
    run: Run, folder: Path, model: FakeModel, tmp_path: Path
) -> None:
    image = ImageRef(path=paint(tmp_path / "blue.png", COLOURS["blue"]))
    file = tmp_path / "query.json"
    file.write_text(json.dumps([{"type": "text", "text": "like"}, {"image": "blue.png"}]))
    for command in ("search", "ask"):
        assert "blue" in run(command, folder, "--query", file, "-k", 1).stdout
        assert model.queries.pop() == ("like", image)
    for other in (["red"], ["--text", "red"], ["--image", image.path]):
        with pytest.raises(DataError, match="a query beside that of the file"):
            run("search", folder, "--query", file, *other)
    with pytest.raises(RetrievalError, match="both a query and --like"):
        run("search", folder, "--query", file, "--like", "red")


def test_a_conversation_may_be_the_query(
    run: Run, folder: Path, model: FakeModel, tmp_path: Path
) -> None:
    turns = (Message("user", ("red",)), Message("assistant", ("Yes.",)), Message("user", ("more",)))
    file = tmp_path / "query.json"
    messages = [{"role": turn.role, "content": turn.parts[0]} for turn in turns]
    file.write_text(json.dumps({"messages": messages}))
    for options, query in (([], ("more",)), (["--scope", "dialog"], turns)):
        values = json.loads(run("ask", folder, "--query", file, "--json", *options).stdout)
        assert model.queries.pop() == query and "assistant: Yes." in values["prompt"]
    run("search", folder, "--query", file)
    assert model.queries.pop() == turns
    assert run("ask", folder, "red", "--scope", "all").exit_code == 2


def test_options_of_a_search_select_hits(run: Run, folder: Path) -> None:
    def find(*arguments: object) -> list[str]:
        lines = run("search", folder, *arguments).stdout.splitlines()
        return [line.split("\t")[2] for line in lines]

    assert find("red", "--offset", 1, "-k", 1) == ["yellow"]
    assert find("red", "--threshold", 0.9) == ["red"]
    assert find("red", "--distinct", "--exact", "-k", 2) == ["red", "yellow"]
    assert find("--like", "red", "-k", 1) == ["yellow"]
    assert find("red", "--where", "year>2000 and hue in yellow,'red'") == ["yellow"]
    with pytest.raises(RetrievalError, match="both a query and --like"):
        run("search", folder, "red", "--like", "red")
    with pytest.raises(RetrievalError, match="no document 'pink'"):
        run("search", folder, "--like", "pink")
    with pytest.raises(RetrievalError, match="from -1 to 1"):
        run("search", folder, "red", "--threshold", 3)


def test_a_document_like_another_one_is_found_without_the_model(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").rmdir()
    assert "yellow" in run("search", folder, "--like", "red", "-k", 1).stdout


def test_index_check_measures_the_recall_of_an_index(
    run: Run, folder: Path, pairs: Path, tmp_path: Path
) -> None:
    assert (
        "recall@10 1.000 for 4 of 4 documents; searches are exact"
        in run("index", "check", folder).stdout
    )
    command = ["index", tmp_path / "model", pairs, "--to", folder, "--ann"]
    run(*command, "on")
    values = json.loads(run("index", "check", folder, "--sample", 2, "--json").stdout)
    assert values["is_approximate"] and (values["recall"], values["sample"]) == (1.0, 2)
    run(*command, "off")
    assert "searches are exact" in run("index", "check", folder).stdout
    assert run("index", "check").exit_code == 2 and run(*command, "maybe").exit_code == 2
    assert "--sample" in run("index", "check", "--help").stdout
    assert "vlduet index check" in run("index", "--help").stdout


def test_model_of_the_index_is_checked_and_may_be_named(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RetrievalError, match="another"):
        run("search", folder, "red", "--model", tmp_path / "other")
    with pytest.raises(RetrievalError, match="empty query"):
        run("search", folder)
    (tmp_path / "model").rmdir()
    with pytest.raises(RetrievalError, match="--model DIR"):
        run("search", folder, "red")
    assert "a red square" in run("search", folder, "red", "--model", tmp_path).stdout


def test_ask_prints_the_answer_and_its_sources(run: Run, folder: Path, model: FakeModel) -> None:
    text = run("ask", folder, "red?", "-k", 1, "--where", "hue=red").stdout
    assert text.startswith("An answer.\n\nSources:\n[1] red (")
    values = json.loads(run("ask", folder, "red?", "-k", 2, "--json").stdout)
    assert values["answer"] == "An answer."
    assert [source["rank"] for source in values["sources"]] == [1, 2]
    assert "[references]" in values["prompt"] and len(model.conversations) == 2


def test_encode_writes_ids_and_unit_vectors(run: Run, pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    write_records(pairs, [*rows, {"id": "missing", "image": "missing.png", "short": "missing"}])
    out = tmp_path / "vectors.npz"
    result = run("encode", tmp_path, pairs, "--out", out)
    assert "4 vectors of 64 numbers" in result.stdout
    assert "1 left out (1 x no such image): see" in result.stdout
    assert f"vlduet data check {pairs}" in result.stdout
    with np.load(out) as arrays:
        assert arrays["ids"].tolist() == ["red", "green", "blue", "yellow"]
        np.testing.assert_allclose(np.linalg.norm(arrays["vectors"], axis=1), 1, rtol=1e-6)
    result = run("encode", tmp_path, pairs, "--out", out, "--side", "text", "--json")
    expected = {"out": str(out), "count": 5, "dim": 64, "quarantined": 0, "truncated": 0}
    expected |= {"unread": {}, "system_files": {}}
    assert json.loads(result.stdout) == expected
    with pytest.raises(RetrievalError, match="nothing to embed"):
        run("encode", tmp_path, write_records(tmp_path / "none.jsonl", []), "--out", out)


@pytest.fixture
def long_texts(model: FakeModel, tmp_path: Path) -> Path:
    """Two texts that differ behind the limit of the model, 1,200 words, and a short one."""
    model.max_words = 1200
    texts = {"one": "word " * 1300 + "cats", "two": "word " * 1300 + "dogs", "short": "a word"}
    rows = [{"id": name, "image": "x.png", "short": text} for name, text in texts.items()]
    paint(tmp_path / "x.png", (0, 0, 0))
    return write_records(tmp_path / "long.jsonl", rows)


def test_long_texts_are_left_out_of_vectors_or_cut(
    run: Run, long_texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "vectors.npz"
    command = ["encode", tmp_path, long_texts, "--side", "text", "--out", out]
    lines = run(*command).stdout.splitlines()
    assert lines[0] == f"{out}: 1 vectors of 64 numbers"
    assert lines[1].startswith("2 left out (2 x longer than the limit of the model): see ")
    assert lines[2].startswith("--truncate cuts texts")
    listed = [json.loads(line) for line in quarantine_path(out).read_text().splitlines()]
    assert [row["id"] for row in listed] == ["one", "two"]
    assert all("(1301 tokens, the limit is 1200)" in row["message"] for row in listed)
    assert all("Shorten or split the text" in row["fix"] for row in listed)
    assert "\n2 texts were cut at 1,200 tokens\n" in run(*command, "--truncate").stdout
    with np.load(out) as arrays:
        assert len(arrays["ids"]) == 3
        np.testing.assert_array_equal(arrays["vectors"][0], arrays["vectors"][1])
    counts = json.loads(run(*command, "--truncate", "--json").stdout)
    assert (counts["truncated"], counts["count"], counts["quarantined"]) == (2, 3, 0)
    write_records(long_texts, [json.loads(long_texts.read_text().splitlines()[0])])
    with pytest.raises(RetrievalError, match=r"nothing to embed.*--truncate"):
        run(*command)


def test_long_texts_are_left_out_of_an_index_or_cut(
    run: Run, long_texts: Path, tmp_path: Path
) -> None:
    command = ["index", tmp_path, long_texts, "--side", "text", "--to", tmp_path / "index"]
    text = run(*command).stdout
    assert "1 documents (1 added)" in text and "--truncate cuts texts" in text
    report = json.loads(run(*command, "--json").stdout)
    assert (report["count"], report["quarantined"], report["truncated"]) == (1, 2, 0)
    text = run(*command, "--truncate").stdout
    assert "3 documents (2 added, 1 kept)\n2 texts were cut at 1,200 tokens\n" in text
    # What is in the index is not embedded, and not cut, again.
    assert json.loads(run(*command, "--truncate", "--json").stdout)["truncated"] == 0


def test_control_characters_of_documents_do_not_reach_the_terminal(
    run: Run, tmp_path: Path
) -> None:
    rows = [{"id": "\x1b[2J", "parts": [{"text": "a\tb\nc \x1b]0;x\x07"}]}]
    source = write_records(tmp_path / "r.jsonl", rows)
    run("index", tmp_path, source, "--to", tmp_path / "index", "--side", "text")
    for command in ("search", "ask"):
        text = run(command, tmp_path / "index", "a").stdout
        assert "\x1b" not in text and "\x07" not in text
    assert len(run("search", tmp_path / "index", "a").stdout.split("\t")) == 5


def test_hits_are_a_table_on_a_terminal(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    app(["search", str(folder), "red", "-k", "2"], standalone_mode=False)
    table = capsys.readouterr().out
    assert "rank" in table and "1.0" in table and "red" in table


def test_a_calibrated_model_gives_hits_a_p(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")

    def run_command(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
        return json.loads(result.stdout)

    run_command("index", tmp_path / "model", pairs, "--to", tmp_path / "index")
    hits = run_command("search", tmp_path / "index", "red")["hits"]
    assert len(hits) == 4 and all("p" not in hit for hit in hits)
    report = run_command("model", "calibrate", tmp_path / "model", pairs)
    assert report["records"] == 4 and report["pairs"]["text -> image"] == 12
    assert report["dropped"] == 0
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text(pairs.read_text() + "{\n")
    report = run_command("model", "calibrate", tmp_path / "model", damaged, "--root", pairs.parent)
    assert (report["records"], report["dropped"], len(report["causes"])) == (4, 1, 1)
    # The index stays valid, because the fingerprint of the model is the same.
    hits = run_command("search", tmp_path / "index", "red")["hits"]
    assert all(1 / 13 <= hit["p"] <= 1 for hit in hits)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    app(["search", str(tmp_path / "index"), "red", "-k", "1"], standalone_mode=False)
    assert f"{hits[0]['p']:.2g}" in capsys.readouterr().out
    with pytest.raises(DataError, match="no unrelated records"):
        run_command("model", "calibrate", tmp_path / "model", write_records(pairs, []))


def test_a_table_is_indexed_by_its_ids_and_filtered_by_its_numbers(
    run: Run, tmp_path: Path
) -> None:
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        paint(tmp_path / "photos" / f"{name}.png", colour)
    table = tmp_path / "shop.csv"
    table.write_text("id,file,name_en,price\nvase,a.png,red,9.5\nbowl,b.png,blue,30\n")
    command = ["index", tmp_path, table, "--to", tmp_path / "index"]
    result = run(*command)
    assert result.exit_code == 1 and "2 left out (2 x no such image)" in result.stdout
    command += ["--root", tmp_path / "photos", "--columns", "short=name_en"]
    assert "2 documents (2 added)" in run(*command).stdout
    rows = [
        line.split("\t") for line in run("search", tmp_path / "index", "red").stdout.splitlines()
    ]
    assert [row[2:4] for row in rows] == [["vase", "red"], ["bowl", "blue"]]
    cheap = run("search", tmp_path / "index", "blue", "--where", "price<20").stdout
    assert cheap.splitlines()[0].split("\t")[2] == "vase" and "bowl" not in cheap
    with pytest.raises(RetrievalError, match="'cheap': price holds numbers"):
        run("search", tmp_path / "index", "blue", "--where", "price<cheap")
    header, *body = table.read_text().splitlines()
    table.write_text("\n".join([header, *reversed(body)]) + "\n")
    assert "2 kept" in run(*command).stdout, "ids of their own survive a new order"
