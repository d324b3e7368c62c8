"""BARTScore: how likely a sequence-to-sequence model finds one text after another, for WebQA's fluency.

Yuan et al., 2021: the mean log-likelihood of the target's tokens given the source, special tokens included, both texts cut
at 1,024 tokens. The checkpoint is the user's (WebQA takes BART-large, fine-tuned on ParaBank2).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from vlduet.errors import ModelError
from vlduet.model.backbone import select_device
from vlduet.model.processing import read_config

MAX_TEXT_TOKENS = 1024
PAIRS_PER_BATCH = 8


class BartScorer:
    """A local BART-like checkpoint in safetensors.

    Args:
        folder: with config, tokenizer and weights.
        device: default: the accelerator where there is one.

    Raises:
        ModelError: no such folder, or no sequence-to-sequence model in it.
    """

    def __init__(self, folder: Path, *, device: Any = None):
        config = read_config(folder)
        if not config.get("is_encoder_decoder"):
            what = f"a model of type '{config.get('model_type')}' is no sequence-to-sequence model"
            raise ModelError(what, place=folder, fix="Name a folder with a BART checkpoint")
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                folder, use_safetensors=True, local_files_only=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            what = f"cannot be opened ({str(error).splitlines()[0]})"
            raise ModelError(
                what, place=folder, fix="Save it with tokenizer and safetensors"
            ) from None
        self.model = model.to(device or select_device()).eval()

    @torch.no_grad()
    def __call__(self, pairs: Many[tuple[str, str]]) -> list[float]:
        """(source, target) pairs -> nats a token of each target, at least 0."""
        found: list[float] = []
        for begin in range(0, len(pairs), PAIRS_PER_BATCH):
            rows = pairs[begin : begin + PAIRS_PER_BATCH]
            sources, targets = (self._tokens([pair[side] for pair in rows]) for side in (0, 1))
            real = targets["attention_mask"].bool()  # [B, T]
            labels = targets["input_ids"]
            logits = self.model(
                **sources, labels=labels.masked_fill(~real, -100)
            ).logits  # [B, T, V]
            nats = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
            found += ((nats * real).sum(1) / real.sum(1)).tolist()
        return found

    def _tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        limit = min(
            MAX_TEXT_TOKENS, getattr(self.model.config, "max_position_embeddings", MAX_TEXT_TOKENS)
        )
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
