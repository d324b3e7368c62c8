"""Embedding of documents, and vectors written for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlduet.data.records import ImageRef
from vlduet.errors import DataError, RetrievalError
from vlduet.retrieval.documents import Document, read_documents
from vlduet.retrieval.encode import encode_documents, write_vectors


def fail(document: Any, error: DataError) -> None:
    raise AssertionError(f"{document}: {error}")


def texts(count: int) -> list[Document]:
    return [Document(str(i), (f"word{i}",), "") for i in range(count)]


def test_vectors_are_in_the_order_of_their_documents(pairs: Path, model: Any) -> None:
    items = list(read_documents(pairs, side="record", on_error=fail))
    chunks = list(encode_documents(model, items, on_error=fail, chunk_size=3))
    assert [len(group) for group, _ in chunks] == [3, 1]
    for group, vectors in chunks:
        np.testing.assert_array_equal(vectors, model.encode_query([d.parts for d in group]))
        assert vectors.dtype == np.float32


@pytest.mark.parametrize("broken", [{0}, {6}, {2, 3}, set(range(7)), {1, 4, 6}])
def test_broken_documents_are_reported_and_the_others_embedded(
    tmp_path: Path, model: Any, broken: set[int]
) -> None:
    items = texts(7)
    missing = ImageRef(path=tmp_path / "missing.png")
    items = [Document(d.id, (missing,), "") if i in broken else d for i, d in enumerate(items)]
    failed: list[str] = []
    chunks = list(
        encode_documents(model, items, on_error=lambda d, error: failed.append(d.id), chunk_size=5)
    )
    embedded = [d.id for group, _ in chunks for d in group]
    assert failed == [str(i) for i in sorted(broken)]
    assert embedded == [str(i) for i in range(7) if i not in broken]
    assert all(len(group) == len(vectors) > 0 for group, vectors in chunks)


def test_encoding_is_lazy(model: Any) -> None:
    read = []

    def source() -> Any:
        for document in texts(100):
            read.append(document.id)
            yield document

    next(encode_documents(model, source(), on_error=fail, chunk_size=8))
    assert len(read) == 8


def test_errors_of_our_own_are_not_swallowed(model: Any) -> None:
    model.encode_document = lambda items, on_truncate: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(encode_documents(model, texts(3), on_error=fail))


def test_vector_file_can_be_read_without_pickle(tmp_path: Path, model: Any) -> None:
    vectors = model.encode_document([("one",), ("two",)])
    path = tmp_path / "new" / "vectors.npz"
    write_vectors(path, ids=["é", "a b"], vectors=vectors)
    with np.load(path) as arrays:
        assert arrays["ids"].tolist() == ["é", "a b"]
        assert arrays["vectors"].dtype == np.float32
        np.testing.assert_array_equal(arrays["vectors"], vectors)
    assert [p.name for p in path.parent.iterdir()] == ["vectors.npz"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, model: Any, monkeypatch: Any) -> None:
    path = tmp_path / "vectors.npz"
    write_vectors(path, ids=["a"], vectors=model.encode_document([("one",)]))
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(RetrievalError, match="No space left"):
        write_vectors(path, ids=["b"], vectors=model.encode_document([("two",)]))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["vectors.npz"]


def test_documents_beyond_the_limit_are_left_out_or_cut_once(model: Any) -> None:
    model.max_words = 3
    long = [Document(str(i), (f"a b c d{i}",), "") for i in range(2)]
    broken = Document("broken", (ImageRef(path=Path("missing.png")),), "")
    documents = [long[0], *texts(3), broken, long[1]]
    refused: list[str] = []
    chunks = list(
        encode_documents(model, documents, on_error=lambda d, error: refused.append(d.id))
    )
    assert refused == ["0", "broken", "1"] and [len(group) for group, _ in chunks] == [3]
    cut: list[tuple[str, int]] = []
    refused.clear()
    ((group, vectors),) = encode_documents(
        model,
        documents,
        on_error=lambda d, error: refused.append(d.id),
        on_truncate=lambda d, num_tokens: cut.append((d.id, num_tokens)),
    )
    # The broken document makes the chunk be embedded in halves; each cut is reported once.
    assert refused == ["broken"] and len(group) == 5
    assert cut == [("0", 4), ("1", 4)]
    np.testing.assert_array_equal(vectors[0], vectors[-1])
