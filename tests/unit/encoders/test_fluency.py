"""BARTScore against its definition, and folders that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import tiny
from vlduet.encoders.fluency import BartScorer
from vlduet.errors import ModelError

PAIRS = [
    ("the frog is white", "a white frog"),
    ("yes", "no, it is green"),
    ("the frog is white", "a"),
    ("x", "x" * 99),
]


@torch.no_grad()
def compute_reference_nats(scorer: BartScorer, source: str, target: str) -> float:
    """Return the mean nats per token of a target, by one pair without padding."""
    source_ids = scorer.tokenizer(source, truncation=True, max_length=64)["input_ids"]
    target_ids = scorer.tokenizer(target, truncation=True, max_length=64)["input_ids"]
    decoder_ids = [scorer.model.config.decoder_start_token_id, *target_ids[:-1]]
    outputs = scorer.model(
        input_ids=torch.tensor([source_ids]), decoder_input_ids=torch.tensor([decoder_ids])
    )
    log_probabilities = outputs.logits[0].log_softmax(-1)
    nats = [-float(log_probabilities[i, token]) for i, token in enumerate(target_ids)]
    return sum(nats) / len(nats)


def test_scores_of_a_batch_are_mean_nats_per_token_of_each_target(tmp_path: Path) -> None:
    scorer = BartScorer(tiny.build_bart(tmp_path))
    scorer.model.double()
    for (source, target), nats in zip(PAIRS, scorer(PAIRS), strict=True):
        assert nats == pytest.approx(compute_reference_nats(scorer, source, target), rel=1e-5)


def test_no_pairs_give_no_scores(tmp_path: Path) -> None:
    assert BartScorer(tiny.build_bart(tmp_path))([]) == []


def test_a_model_without_a_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no sequence-to-sequence model"):
        BartScorer(tiny.build_text_encoder(tmp_path / "bert"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny.build_bart(tmp_path / "bart")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        BartScorer(folder)
