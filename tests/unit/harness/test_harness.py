"""Adapters to other harnesses where these are installed; elsewhere the missing extra is named."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.errors import MissingExtraError

MODULES = {"mteb": "vlduet.harness.mteb", "lmms_eval": "vlduet.harness.lmms_eval"}
MANIFEST = "vlduet.harness.lmms_eval:manifest"


@pytest.mark.parametrize("harness", MODULES)
def test_missing_harness_names_the_extra(harness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == harness or name == MODULES[harness]:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, harness, None)
    with pytest.raises(MissingExtraError, match="pip install 'vlduet"):
        importlib.import_module(MODULES[harness])


# ------------------------------------------------------------------ mteb


def test_mteb_evaluates_a_tiny_model(tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb")
    mocks = pytest.importorskip("mteb.mocks")
    from vlduet.harness.mteb import MTEBEncoder

    encoder = MTEBEncoder(tiny.build_duet_model(tmp_path / "base"))
    tasks = [mocks.MockAny2AnyRetrievalI2TTask(), mocks.MockImageTextPairClassificationTask()]
    results = mteb.evaluate(encoder, tasks, cache=None, co2_tracker=False).task_results
    names = {task.metadata.name for task in tasks}
    assert {result.task_name for result in results} == names
    assert encoder.mteb_model_meta.revision == encoder.model.fingerprint


def test_mteb_batches_are_embedded_as_the_model_embeds_them(tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    from vlduet.harness.mteb import MTEBEncoder

    encoder = MTEBEncoder(tiny.build_duet_model(tmp_path / "base"))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = images.from_pixels(pixels)
    batches: list[dict[str, list[Any]]] = [
        {"image": [image], "text": ["a cat"]},
        {"image": [image], "text": ["b"]},
    ]
    embeddings = encoder.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")
    ref = ImageRef(data=images.encode_png(image))
    expected = encoder.model.encode([(ref, "a cat"), (ref, "b")])
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


# ------------------------------------------------------------------ lmms-eval


class Request:
    """Request of lmms-eval, of which only the arguments are read."""

    def __init__(self, *args: Any):
        self.args = args


def test_lmms_eval_finds_the_model_and_gets_answers_and_likelihoods(tmp_path: Path) -> None:
    registry = pytest.importorskip("lmms_eval.models.registry_v2", exc_type=ImportError)
    pytest.importorskip("lmms_eval.api.model", exc_type=ImportError)
    from vlduet.harness.lmms_eval import LmmsModel, manifest, truncate_at_stop

    models = registry.ModelRegistryV2()
    models.register_manifest(manifest())
    assert models.resolve("vlduet").class_path == "vlduet.harness.lmms_eval.LmmsModel"
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    model = LmmsModel(str(tmp_path / "model"), batch_size=1)
    image = images.from_pixels(np.zeros((8, 8, 3), dtype=np.uint8))
    model.task_dict = {"task": {"test": [{"image": image, "answer": "a cat"}]}}
    location = (lambda document: [document["image"]], 0, "task", "test")
    options = {"max_new_tokens": 3, "until": ["\n\n"]}
    answers = model.generate_until([Request("What is it?", options, *location)])
    ref = ImageRef(data=images.encode_png(image))
    assert model.functions.generate is not None
    expected = model.functions.generate([(ref, "What is it?")], 3)
    assert answers == [truncate_at_stop(expected[0], "\n\n")]
    likelihoods = model.loglikelihood(
        [
            Request("What is it?", "a cat", *location),
            Request("What is it?", lambda document: document["answer"], *location),
        ]
    )
    log_probability = likelihoods[0][0]
    assert log_probability < 0 and log_probability == pytest.approx(likelihoods[1][0], rel=1e-5)


@pytest.mark.parametrize(
    ("text", "until", "truncated"),
    [("a cat\n\nUSER", ["\n\n"], "a cat"), ("a", "", "a"), ("a. b! c", ["!", "."], "a")],
)
def test_text_is_cut_at_the_first_stop(text: str, until: Any, truncated: str) -> None:
    pytest.importorskip("lmms_eval.api.model", exc_type=ImportError)
    from vlduet.harness.lmms_eval import truncate_at_stop

    assert truncate_at_stop(text, until) == truncated


def test_entry_point_of_lmms_eval_is_declared_and_exists() -> None:
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"]["vlduet"] == MANIFEST
    assert importlib.util.find_spec(MANIFEST.partition(":")[0]) is not None
    installed = [e.value for e in entry_points(group="lmms_eval.models") if e.name == "vlduet"]
    assert set(installed) <= {MANIFEST}, "install the package again"
