"""Our models in other harnesses, where those are installed; everywhere else, what is missing is said."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.errors import MissingExtraError

HARNESSES = {"mteb": "vlduet.harness.mteb", "lmms_eval": "vlduet.harness.lmms_eval"}


@pytest.mark.parametrize("harness", HARNESSES)
def test_without_the_harness_the_extra_is_named(
    harness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name.split(".")[0] == harness or name == HARNESSES[harness]
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, harness, None)
    with pytest.raises(MissingExtraError, match="pip install 'vlduet"):
        importlib.import_module(HARNESSES[harness])


def test_mteb_evaluates_a_tiny_model(tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb")
    mocks = pytest.importorskip("mteb.mocks")
    from vlduet.harness.mteb import MTEBEncoder

    encoder = MTEBEncoder(tiny.build_duet_model(tmp_path / "base"))
    tasks = [mocks.MockAny2AnyRetrievalI2TTask(), mocks.MockImageTextPairClassificationTask()]
    result = mteb.evaluate(encoder, tasks, cache=None, co2_tracker=False)
    assert {found.task_name for found in result.task_results} == {
        task.metadata.name for task in tasks
    }
    assert encoder.mteb_model_meta.revision == encoder.model.fingerprint


def test_mteb_batches_become_our_vectors(tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    from vlduet.harness.mteb import MTEBEncoder

    encoder = MTEBEncoder(tiny.build_duet_model(tmp_path / "base"))
    picture = images.from_pixels(
        np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    )
    batches: list[dict[str, list[Any]]] = [
        {"image": [picture], "text": ["a cat"]},
        {"image": [picture], "text": ["b"]},
    ]
    found = encoder.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")
    reference = ImageRef(data=images.encode_png(picture))
    assert np.allclose(
        found, encoder.model.encode([(reference, "a cat"), (reference, "b")]), atol=1e-5
    )


def test_lmms_eval_finds_and_asks_a_tiny_model(tmp_path: Path) -> None:
    registry = pytest.importorskip("lmms_eval.models.registry_v2", exc_type=ImportError)
    pytest.importorskip("lmms_eval.api.model", exc_type=ImportError)
    from vlduet.harness.lmms_eval import LmmsModel, manifest, truncate_at_stop

    known = registry.ModelRegistryV2()
    known.register_manifest(manifest())
    assert known.resolve("vlduet").class_path == "vlduet.harness.lmms_eval.LmmsModel"
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "mine")
    model = LmmsModel(str(tmp_path / "mine"), batch_size=1)
    picture = images.from_pixels(np.zeros((8, 8, 3), dtype=np.uint8))
    model.task_dict = {"t": {"test": [{"image": picture, "answer": "a cat"}]}}

    class Request:
        def __init__(self, *args: Any):
            self.args = args

    where = (lambda doc: [doc["image"]], 0, "t", "test")
    (text,) = model.generate_until(
        [Request("What is it?", {"max_new_tokens": 3, "until": ["\n\n"]}, *where)]
    )
    assert isinstance(text, str)
    likely = model.loglikelihood(
        [
            Request("What is it?", "a cat", *where),
            Request("What is it?", lambda doc: doc["answer"], *where),
        ]
    )
    assert likely[0][0] < 0 and likely[0][0] == pytest.approx(likely[1][0], rel=1e-5)
    assert (
        truncate_at_stop("a cat\n\nUSER", ["\n\n"]) == "a cat" and truncate_at_stop("a", "") == "a"
    )


def test_the_entry_point_is_declared() -> None:
    found = [e for e in entry_points(group="lmms_eval.models") if e.name == "vlduet"]
    if not found:  # the package is on the path, but it was not installed since
        told = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        assert 'vlduet = "vlduet.harness.lmms_eval:manifest"' in told
        return
    assert found[0].value == "vlduet.harness.lmms_eval:manifest"
    assert importlib.util.find_spec(found[0].module) is not None
