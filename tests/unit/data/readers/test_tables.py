"""Tables as text: separators, encodings and types are recognised, broken rows are errors."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.record_files import read_error, read_single, read_with_errors, relative_places
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_tables_have_a_header_and_any_usual_delimiter(
    suffix: str, delimiter: str, tmp_path: Path
) -> None:
    source = tmp_path / f"x.{suffix}"
    rows = [
        ["file_name", "caption", "title", "year"],
        ["a.png", '"one\ntwo"', "T", "1990"],
        ["b.png", "", "", ""],
    ]
    source.write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows))
    first, second = read_records(source)
    assert first.image == ImageRef(path=tmp_path / "a.png") and first.short == ("one\ntwo", "T")
    assert first.metadata == {"year": 1990}
    assert (first.id, second.id) == (f"x.{suffix}:2", f"x.{suffix}:4")
    assert second.short == () and second.place is not None and second.place.line == 4


def test_broken_rows_of_a_table_do_not_stop_the_others(tmp_path: Path) -> None:
    source = tmp_path / "x.csv"
    lines = [
        b"image,caption",
        b"a.png,one",
        b"b.png,two,three",
        b"c.png,\xff",
        b'd.png,"x" y',
        b",no image",
        b"e.png,five",
    ]
    source.write_bytes(b"\n".join(lines) + b"\n")
    records, errors = read_with_errors(source)
    assert [record.short for record in records] == [("one",), ("five",)]
    assert relative_places(source, errors) == ["3:three", "4:caption", "5", "6:image"]


def test_a_header_with_equal_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,text,text\na.png,b,c\n")
    assert "a column twice: image, text, text" in str(read_error(tmp_path / "x.csv"))


def test_the_case_of_a_file_s_suffix_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "T.CSV").write_text("image,caption\na.png,a boat\n")
    assert read_single(tmp_path / "T.CSV").short == ("a boat",)


# --- separators and encodings


def write_table(path: Path, rows: list[list[str]], separator: str, encoding: str) -> Path:
    """Write rows of texts as CSV."""
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows(rows)
    path.write_bytes(file.getvalue().encode(encoding))
    return path


CELLS = st.text(st.sampled_from("ab ,;|\t\"\n'ü"), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(CELLS, min_size=1, max_size=6),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_cells_of_a_csv_writer_are_read_unchanged(
    tmp_path_factory: pytest.TempPathFactory,
    captions: list[str],
    separator: str,
    encoding: str,
) -> None:
    rows = [["file_name", "caption "], *(["a.png", caption] for caption in captions)]
    path = tmp_path_factory.mktemp("table") / "x.csv"
    records = read_records(write_table(path, rows, separator, encoding))
    assert [record.short for record in records] == [(caption,) for caption in captions]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("image_name| comment_number| comment\na.png| 0| A man, in black .\n", "A man, in black ."),
        ("sep=;\nimage;caption\na.png;x, y\n", "x, y"),
        ("image;caption, short\na.png;x, y\n", "x, y"),
        ("image\tcaption\na.png\tx; y, z | w\n", "x; y, z | w"),
        ("image,caption,\na.png,x,\nb.png,y,\n", "x"),
        ("\n,,\nimage,caption\na.png,x\n", "x"),
    ],
)
def test_separators_that_spreadsheets_and_flickr_write(
    text: str, caption: str, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text(text)
    record = next(read_records(tmp_path / "x.csv", columns=None))
    values = (*record.short, *record.metadata.values())
    assert caption in values and record.image == ImageRef(path=tmp_path / "a.png")


def test_a_text_without_a_byte_order_mark_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("image,caption\na.png,x\n".encode("utf-16-le"))
    assert "UTF-16 without a byte order mark" in str(read_error(tmp_path / "x.csv"))
    (tmp_path / "x.csv").write_bytes(b"image,caption \xe4\na.png,x\n")
    assert "header that is not UTF-8" in str(read_error(tmp_path / "x.csv"))


def test_an_open_quote_says_that_the_rest_is_lost(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('image,caption\na.png,x\nb.png,"y\nc.png,z\n')
    records, errors = read_with_errors(tmp_path / "x.csv")
    assert len(records) == 1 and "the rest of the file is not read" in str(errors[0])


# --- types and ids


def test_a_column_of_numbers_is_numbers_and_all_others_are_texts(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(
        "image,count,price,code,date,sold,mixed,amount,big,exponent\n"
        'a.png,12,12.5,00123,2024-01-02,true,7,"1,200",12345678901234567,1E5\n'
        "b.png,,7,00456,2024-01-03,FALSE,x,7,1,2E5\n"
        "c.png,-3,1e-05,7,2024-01-04,True,8,8,2,3E5\n"
    )
    first, second, third = read_records(tmp_path / "x.csv")
    assert first.metadata == {
        "count": 12,
        "price": 12.5,
        "code": "00123",
        "date": "2024-01-02",
        "sold": True,
        "mixed": "7",
        "amount": "1,200",
        "big": "12345678901234567",
        "exponent": "1E5",
    }
    assert "count" not in second.metadata and second.metadata["sold"] is False
    assert isinstance(second.metadata["price"], float), "one type per column"
    assert third.metadata["count"] == -3 and third.metadata["price"] == 1e-5


def test_prices_with_a_decimal_comma_are_numbers_in_a_table_of_semicolons(tmp_path: Path) -> None:
    source = tmp_path / "shop.csv"
    source.write_text("image;caption;price;size\na.png;red;12,50;1,5\na.png;blue;-3;2,5\n")
    records = list(read_records(source))
    assert [record.metadata["price"] for record in records] == [12.5, -3.0]
    assert [record.metadata["size"] for record in records] == ["1,5", "2,5"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-(10**14), 10**14) | st.floats(-1e6, 1e6), min_size=1, max_size=5),
    st.booleans(),
)
def test_a_number_of_a_column_keeps_its_value_and_a_text_makes_all_texts(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[float], has_text: bool
) -> None:
    cells = [*map(str, numbers), *(["n/a"] if has_text else [])]
    rows = [["image", "price"], *(["a.png", cell] for cell in cells)]
    path = tmp_path_factory.mktemp("types") / "x.csv"
    records = list(read_records(write_table(path, rows, ",", "utf-8")))
    expected = cells if has_text else numbers
    assert [record.metadata["price"] for record in records] == expected


def test_captions_and_ids_of_digits_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("ID,image,title,year\n007,a.png,1984,1984\n,b.png,2001,1968\n")
    first, second = read_records(tmp_path / "x.csv")
    assert (first.id, first.short, first.metadata) == ("007", ("1984",), {"year": 1984})
    assert second.id == "x.csv:3", "an empty id is none"
