"""Miniature official files, and the functions of a tiny random model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers import official, tiny
from vlduet.data.records import Parts
from vlduet.eval.predictions import ModelFunctions
from vlduet.harness.builtin import EvaluationSettings, model_functions


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a few items of every benchmark."""
    return official.write_official_files(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="session")
def tiny_functions(tmp_path_factory: pytest.TempPathFactory) -> ModelFunctions:
    """The functions of a tiny random model, with short answers and a grader that likes them all."""
    model = tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")
    functions = model_functions(model, EvaluationSettings())

    def grade(settings: Mapping[str, Any], prompt: str, temperature: float) -> str:
        return "0.5" if "Correctness" in prompt else "8 9\nfine"

    def generate(prompts: list[Parts], max_new_tokens: int) -> list[str]:
        assert functions.generate is not None
        return functions.generate(prompts, 3)

    return ModelFunctions(
        embed=functions.embed,
        generate=generate,
        continuation_nll=functions.continuation_nll,
        retriever_embed=functions.embed,
        grade=grade,
    )
