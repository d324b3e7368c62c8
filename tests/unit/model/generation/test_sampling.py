"""Sampling: the probabilities of a request equal those of transformers, in its order of steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig
from transformers.generation import GenerationMixin

from helpers import tiny
from vlduet.data.records import Message
from vlduet.model.duet import DuetModel
from vlduet.model.generation.continuous import ContinuousBatcher, Request, SamplingParams

GRID = list(
    itertools.product((0.7, 1.0, 1.6), (0, 1, 7, 10**9), (1.0, 0.8, 1e-6), (0.0, 0.05, 0.5, 1.0))
)
"""Temperature, top_k, top_p and min_p."""


def transformers_processors(**options: object) -> LogitsProcessorList:
    """Return the processors that transformers' `generate` uses for sampling with options."""
    config = GenerationConfig(do_sample=True, **options)
    config._eos_token_tensor = None
    owner = GenerationMixin()
    owner.config = PretrainedConfig()
    processors = owner._get_logits_processor(config, input_ids_seq_length=0)
    assert isinstance(processors, LogitsProcessorList)
    return processors


def test_probabilities_equal_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 4 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    offered: list[Tensor] = []

    def record(probabilities: Tensor, *_: object, **__: object) -> Tensor:
        offered.append(probabilities)
        return probabilities.argmax(1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", record)
    for temperature, top_k, top_p, min_p in GRID:
        params = SamplingParams(temperature, top_p, 5, top_k=top_k, min_p=min_p)
        Request(1, sampling_params=params).sample_token(logits)
        processors = transformers_processors(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        expected = processors(torch.empty(1, 0, dtype=torch.long), logits).softmax(1)
        assert_close(offered[-1], expected, msg=f"{params}")
        num_possible = int((expected > 0).sum())
        assert num_possible == 1 or top_k != 1
    assert len(offered) == len(GRID)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    folder = tmp_path_factory.mktemp("model") / "base"
    return tiny.scale_up_weights(tiny.build_duet_model(folder))


def generate_ids(model: DuetModel, penalty: float | None) -> list[int]:
    """Return the tokens of a greedy answer with a penalty."""
    params = SamplingParams(repetition_penalty=penalty)
    request = Request(12, sampling_params=params)
    sequence = model.renderer.render_chat(
        (Message("user", ("go on",)),), add_generation_prompt=True
    )
    batcher = ContinuousBatcher(model.backbone, [])
    batcher.add_requests(model.prefill_inputs([sequence]), [request])
    while batcher.requests:
        batcher.step()
    return request.token_ids


def test_penalty_of_a_request_replaces_the_checkpoint_s(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty of a checkpoint is that of transformers (test_continuous.py)."""
    config = model.backbone.model.generation_config
    answers = {}
    for penalty in (1.0, 1.8):
        monkeypatch.setattr(config, "repetition_penalty", penalty)
        answers[penalty] = generate_ids(model, None)
    assert answers[1.0] != answers[1.8]
    assert generate_ids(model, 1.0) == answers[1.0]
    monkeypatch.setattr(config, "repetition_penalty", 1.0)
    assert generate_ids(model, 1.8) == answers[1.8]
