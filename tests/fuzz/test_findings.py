"""Files with which a long run of `test_fuzz` has found exceptions that are not ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from vlduet.encoders.dual import open_embedder
from vlduet.errors import ModelError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    tiny.build_duet_model(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 0}]}, "missing field"),
        ("tokenizer.json", {"post_processor": {"type": "none"}}, "PostProcessor"),
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id is .*, not a number"),
        ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id is .*, not a number"),
        ("tokenizer_config.json", {"model_max_length": "9"}, "model_max_length is '9', not a"),
    ],
)
def test_a_checkpoint_with_values_of_other_types_is_refused(
    checkpoint: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(checkpoint, folder)
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))
    with pytest.raises(ModelError, match=message) as caught:
        open_embedder(folder)
    assert str(folder) in str(caught.value)
