"""Soft prompts: the tokens of the written prompts become learned ones, trained beside LoRA (VladVA, arXiv 2412.04378).

A learned token is an ordinary special token that the tokenizer gets, `<|soft_0|>`, `<|soft_1|>`, ...; its embedding is a row
of ours instead of one of the checkpoint's table. The prompts are then written with such tokens,

    {image}\\nSummarize the provided image in one word:    ->    {image}<|soft_0|><|soft_1|> ... <|soft_9|>

each row starting as the embedding of the token that it replaces. So attention mask, positions and layout are those of any
token, the saved prompts say which row stands where, and a user's text cannot spell one. At export the rows go into the
table, and whoever serves the checkpoint gets the same vectors from the same prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlduet.errors import ConfigError
from vlduet.model.backbone import Backbone
from vlduet.model.processing import Tokenizer
from vlduet.model.prompts import SLOT_PATTERN, Prompts, Renderer

ROWS_TENSOR_NAME = "soft.rows"
"""Name of the learned rows among a model's tensors."""


class SoftPrompts(nn.Module):
    """The learned tokens of a model.

    Args:
        backbone: its tokenizer gets the tokens.
        rows: float[N, D], what they start from.
    """

    def __init__(self, backbone: Backbone, rows: Tensor):
        super().__init__()
        self.first_token_id = add_soft_prompt_tokens(backbone.tokenizer, len(rows))
        # In single precision whatever the table has: small steps would be lost.
        self.rows = nn.Parameter(rows.detach().to(backbone.device, torch.float32, copy=True))

    def forward(self, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        """int64[B, T] -> float[B, T, D], from the table or from the learned rows."""
        learned = ids >= self.first_token_id
        known: Tensor = embedding(ids.masked_fill(learned, 0))
        return known.masked_scatter(
            learned[..., None], self.rows[ids[learned] - self.first_token_id].to(known.dtype)
        )

    @torch.no_grad()
    def fold_into_embedding(self, backbone: Backbone) -> None:
        """Write the rows into the table, so that the checkpoint does without this module.

        Where the LM head is the table, the new rows would be words that can be generated: the checkpoint's generation
        config forbids them, and `DuetModel.lm_weight` leaves them out.
        """
        end = self.first_token_id + len(self.rows)
        backbone.resize_token_embeddings(end)
        if backbone.lm_head.weight is not backbone.token_embedding.weight:
            backbone.lm_head.weight[self.first_token_id : end] = 0.0
        scale = getattr(
            backbone.token_embedding, "embed_scale", 1.0
        )  # Gemma makes its table larger as it reads it
        backbone.token_embedding.weight[self.first_token_id : end] = (self.rows / scale).to(
            backbone.token_embedding.weight.dtype
        )
        generation = backbone.model.generation_config
        generation.suppress_tokens = sorted(
            {*(generation.suppress_tokens or ()), *range(self.first_token_id, end)}
        )


def add_soft_prompt_tokens(tokenizer: Tokenizer, count: int) -> int:
    """Give the tokenizer `count` learned tokens, or find them there; the id of the first."""
    tokens = [soft_prompt_token(i) for i in range(count)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
    assert ids == list(range(ids[0], ids[0] + count)) and ids[-1] == max(
        tokenizer.get_vocab().values()
    )
    return ids[0]


def init_soft_prompts(renderer: Renderer, backbone: Backbone) -> SoftPrompts:
    """Learned tokens in place of every token of the renderer's prompts, which are rewritten; images, texts and mixtures
    have tokens of their own. The chat template around a prompt stays as it is.

    Raises:
        ConfigError: the prompts have no tokens.
    """
    ids: list[int] = []
    written: dict[str, str] = {}
    for name in ("image", "text", "parts"):
        before, _, after = SLOT_PATTERN.split(getattr(renderer.prompts, name))
        start = str(renderer.tokenizer.bos_token)
        # Where every sequence begins with it, the start token is no part of the prompt.
        kept = start if renderer.bos_ids and before.startswith(start) else ""
        around = []
        for piece in (before.removeprefix(kept), after):
            found = renderer.tokenizer.encode(piece, add_special_tokens=False)
            around.append("".join(soft_prompt_token(len(ids) + i) for i in range(len(found))))
            ids += found
        written[name] = f"{kept}{around[0]}{{{name}}}{around[1]}"
    if not ids:
        raise ConfigError(
            "the prompts have no tokens to start from",
            place="train.soft_prompts",
            fix="Write some in model.prompts",
        )
    rows = backbone.token_embedding(torch.tensor(ids, device=backbone.device))
    renderer.prompts = Prompts(**(renderer.prompts.to_dict() | written))
    return SoftPrompts(backbone, rows)


def soft_prompt_token(index: int) -> str:
    """How a learned token is written."""
    return f"<|soft_{index}|>"
