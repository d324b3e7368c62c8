"""Tiny tokenizers: one token per byte or character, and a few special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
"""Special tokens of every tiny tokenizer, with ids from 0."""
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>"]
"""Tokens before and after every image of Qwen-VL, InternVL and Gemma."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}{{ '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LINE_END_MERGES = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("ĊĊ", "ĊĊ")]
"""Merges that make one token of two, three or four adjacent line ends, as Gemma's tokenizer."""


def gemma_chat_template(line_end: str) -> str:
    """Return a chat template like Gemma's.

    An image is written as the token that begins one; `line_end` follows the role and the end of
    every turn.
    """
    template = CHAT_TEMPLATE.replace("+ '|>'", f"+ '|>{line_end}'")
    template = template.replace("'</s>'", f"'</s>{line_end}'").replace("t|>'", f"t|>{line_end}'")
    return template.replace("'<image>'", f"'{VISION_TOKENS[0]}'")


def build_tokenizer(
    *,
    bos: bool,
    more: list[str] | None = None,
    names: dict[str, str] | None = None,
    merges: list[tuple[str, str]] | None = None,
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer with one token per byte.

    Args:
        bos: write `<s>` before every text.
        more: further special tokens, with ids after those of the bytes.
        names: attribute names of some special tokens, {attribute: token}.
        merges: pairs of tokens that are merged; their ids follow.
    """
    merges = merges or []
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [first + second for first, second in merges]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(more or []), *merged]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # With merges the text is not split in advance, as in Gemma's tokenizer.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:] + (more or []),
        **({"model_specific_special_tokens": names} if names else {}),
    )


def build_sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer like Llama's: `▁` for spaces, byte fallback, first space stripped."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*SPECIAL_TOKENS, "<unk>", *byte_tokens, "▁", *"abc,.é", "▁a", "▁b"]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [("▁", "a"), ("▁", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def build_wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer like BERT's, whose decoder joins words; it asks to clean up spaces."""
    tokens = [*SPECIAL_TOKENS, "[UNK]", *"abc,.?'é", *(f"##{letter}" for letter in "abcé")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=True,
    )
