"""BARTScore (Yuan et al., 2021), for the fluency of WebQA's answers.

The score of a text given another one is its mean log likelihood per token under a
sequence-to-sequence model, special tokens included, with both texts cut at 1,024 tokens. The user
brings the checkpoint; WebQA uses BART-large, fine-tuned on ParaBank2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from vlduet.encoders.loading import Device
from vlduet.errors import ModelError
from vlduet.hub import resolve_model
from vlduet.model.backbone import select_device
from vlduet.model.folder_checks import check_checkpoint
from vlduet.model.processing import read_config

MAX_TEXT_TOKENS = 1024
PAIRS_PER_BATCH = 8


class BartScorer:
    """BARTScore by a local checkpoint, as a function of text pairs."""

    def __init__(self, folder: Path, *, device: Device | None = None):
        """Load model and tokenizer, in evaluation mode; nothing is downloaded.

        Args:
            folder: with config, tokenizer, and weights in safetensors.
            device: None: the GPU if there is one, else the CPU.

        Raises:
            ModelError: no such folder, or no sequence-to-sequence model in it.
        """
        folder = resolve_model(folder)
        config = read_config(folder)
        check_checkpoint(folder, config)
        if not config.get("is_encoder_decoder"):
            kind = config.get("model_type")
            message = f"a model of type '{kind}' is no sequence-to-sequence model"
            raise ModelError(message, place=folder, fix="Name a folder with a BART checkpoint")
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                folder, use_safetensors=True, local_files_only=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            message = f"cannot be opened ({str(error).splitlines()[0]})"
            fix = "Save it with tokenizer and safetensors"
            raise ModelError(message, place=folder, fix=fix) from None
        self.model = model.to(device or select_device()).eval()

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the mean nats per token, >= 0, of the target of every (source, target) pair.

        Special tokens of the target count. Source and target are cut at 1,024 tokens, or at a lower
        limit of the model. Lower is more likely; the score of the paper is its negative. Without
        pairs: [].
        """
        mean_nats: list[float] = []
        for begin in range(0, len(pairs), PAIRS_PER_BATCH):
            batch = pairs[begin : begin + PAIRS_PER_BATCH]
            sources = self._tokenize([source for source, _ in batch])
            targets = self._tokenize([target for _, target in batch])
            is_token = targets["attention_mask"].bool()  # [B, T]
            labels = targets["input_ids"]
            outputs = self.model(**sources, labels=labels.masked_fill(~is_token, -100))
            logits = outputs.logits.float().transpose(1, 2)  # [B, V, T]
            nats = F.cross_entropy(logits, labels, reduction="none")  # [B, T]
            mean_nats += ((nats * is_token).sum(1) / is_token.sum(1)).tolist()
        return mean_nats

    def _tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return input ids and attention mask, int64[B, T], cut at the model's limit."""
        model_limit = getattr(self.model.config, "max_position_embeddings", MAX_TEXT_TOKENS)
        limit = min(MAX_TEXT_TOKENS, model_limit)
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
