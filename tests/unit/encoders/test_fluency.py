"""BARTScore against its slow definition, and what opens as one."""

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


def test_it_is_the_mean_over_the_target_s_tokens_whatever_the_batch(tmp_path: Path) -> None:
    score = BartScorer(tiny.build_bart(tmp_path))
    score.model.double()
    batched = score(PAIRS)
    for (source, target), found in zip(PAIRS, batched, strict=True):
        ids = [
            score.tokenizer(text, truncation=True, max_length=64)["input_ids"]
            for text in (source, target)
        ]
        shifted = [score.model.config.decoder_start_token_id, *ids[1][:-1]]
        with torch.no_grad():
            logits = score.model(
                input_ids=torch.tensor([ids[0]]), decoder_input_ids=torch.tensor([shifted])
            ).logits.log_softmax(-1)
        slow = -sum(float(logits[0, n, token]) for n, token in enumerate(ids[1])) / len(ids[1])
        assert found == pytest.approx(slow, rel=1e-5)
    assert score([]) == []


def test_what_is_no_bart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no sequence-to-sequence model"):
        BartScorer(tiny.build_text_encoder(tmp_path / "bert"))
    tiny.build_bart(tmp_path / "bart")
    (tmp_path / "bart/model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be opened"):
        BartScorer(tmp_path / "bart")
