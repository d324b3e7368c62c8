"""Soft prompts: trained embeddings instead of hand-written prompts (VladVA, arXiv 2412.04378).

The tokenizer gets special tokens `<|soft_0|>`, `<|soft_1|>`, ...; their embeddings are rows of our
own beside the checkpoint's embedding table. The prompts are then rewritten with these tokens:

    before    {image}\\nSummarize the provided image in one word:
    after     {image}<|soft_0|><|soft_1|> ... <|soft_9|>

Every row starts as the embedding of the token that it replaces. Attention mask and position ids
are those of ordinary tokens, the saved prompts say which row is where, and user text cannot spell
the tokens. At export the rows become rows of the table, so that any server of the checkpoint
computes the same embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlduet.errors import ConfigError
from vlduet.model.backbone import Backbone
from vlduet.model.processing import Tokenizer
from vlduet.model.prompts import SLOT_PATTERN, Prompts, Renderer

ROWS_TENSOR_NAME = "soft.rows"
"""Name of the rows among the tensors of a saved model."""


class SoftPrompts(nn.Module):
    """Trained embeddings of the soft prompt tokens."""

    def __init__(self, backbone: Backbone, rows: Tensor):
        """Add N tokens to the backbone's tokenizer, in place, and create their embeddings.

        Args:
            backbone: checkpoint whose tokenizer lacks the tokens; its weights stay as they are.
            rows: float[N, D], initial embeddings, copied as float32 to the backbone's device; at
                least one.
        """
        super().__init__()
        self.first_token_id = add_soft_prompt_tokens(backbone.tokenizer, len(rows))
        # float32 even if the table has half precision: small optimizer steps would be lost.
        self.rows = nn.Parameter(rows.detach().to(backbone.device, torch.float32, copy=True))

    def forward(self, token_ids: Tensor, embedding: nn.Embedding) -> Tensor:
        """Return the embeddings float[B, T, D] of token ids int64[B, T], in the table's dtype.

        Soft prompt tokens have their own rows, to which gradients flow; all others those of the
        table `embedding`.
        """
        is_soft = token_ids >= self.first_token_id
        embeddings: Tensor = embedding(token_ids.masked_fill(is_soft, 0))
        rows = self.rows[token_ids[is_soft] - self.first_token_id]
        return embeddings.masked_scatter(is_soft[..., None], rows.to(embeddings.dtype))

    @torch.no_grad()
    def fold_into_embedding(self, backbone: Backbone) -> None:
        """Copy the rows into the embedding table, which then works without this module.

        Modifies the backbone in place, but not this module. The table and the LM head grow where
        they are too short. The generation config suppresses the new tokens, because with tied
        weights the rows are also rows of the LM head and would be generated; an LM head of its own
        gets zeros for them.
        """
        end = self.first_token_id + len(self.rows)
        backbone.resize_token_embeddings(end)
        table = backbone.token_embedding.weight
        if backbone.lm_head.weight is not table:
            backbone.lm_head.weight[self.first_token_id : end] = 0.0
        scale = getattr(backbone.token_embedding, "embed_scale", 1.0)  # Gemma scales its embeddings
        table[self.first_token_id : end] = (self.rows / scale).to(table.dtype)
        config = backbone.model.generation_config
        new_tokens = range(self.first_token_id, end)
        config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *new_tokens})


def add_soft_prompt_tokens(tokenizer: Tokenizer, count: int) -> int:
    """Add `count` soft prompt tokens to a tokenizer, in place, and return the id of the first.

    Their ids are consecutive and the highest of the vocabulary, else an assertion fails. `count` is
    at least 1 (IndexError for 0).
    """
    tokens = [soft_prompt_token(i) for i in range(count)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
    assert ids == list(range(ids[0], ids[0] + count))
    assert ids[-1] == max(tokenizer.get_vocab().values())
    return ids[0]


def init_soft_prompts(renderer: Renderer, backbone: Backbone) -> tuple[SoftPrompts, Prompts]:
    """Create soft prompts in place of all tokens of the renderer's image, text and parts prompts.

    The tokenizer gets the new tokens; the renderer is not modified. The chat template around a
    prompt and a begin-of-sequence token in it stay as they are.

    Returns:
        The soft prompts, initialised from the hand-written prompts, and the prompts spelled with
        their tokens.

    Raises:
        ConfigError: the prompts have no token to start from.
    """
    token_ids: list[int] = []
    texts: dict[str, str] = {}
    for name in ("image", "text", "parts"):
        before, _, after = SLOT_PATTERN.split(getattr(renderer.prompts, name))
        bos = renderer.bos_text if before.startswith(renderer.bos_text) else ""
        soft_texts = []
        for text in (before.removeprefix(bos), after):
            ids = renderer.tokenizer.encode(text, add_special_tokens=False)
            first = len(token_ids)
            soft_texts.append("".join(soft_prompt_token(first + i) for i in range(len(ids))))
            token_ids += ids
        texts[name] = f"{bos}{soft_texts[0]}{{{name}}}{soft_texts[1]}"
    if not token_ids:
        raise ConfigError(
            "the prompts have no tokens to start from",
            place="train.soft_prompts",
            fix="Write some in model.prompts",
        )
    rows = backbone.token_embedding(torch.tensor(token_ids, device=backbone.device))
    prompts = Prompts(**(renderer.prompts.to_dict() | texts))
    return SoftPrompts(backbone, rows), prompts


def soft_prompt_token(index: int) -> str:
    """Return the text of the soft prompt token `index`, from 0."""
    return f"<|soft_{index}|>"
