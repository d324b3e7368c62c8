"""Embed texts and images: vlduet against transformers and sentence-transformers, same weights.

    vlduet                  DuetModel.encode(items): batches of similar length by a token budget,
                            short items packed into rows
    vlduet, padded          the same batches, one item per row
    transformers            batches of 32 in the given order, padded to the longest; one
                            `model.model(...)` per batch; states pooled by hand, then the head
    sentence-transformers   SentenceTransformer([Transformer, Pooling, Dense]) on the same language
                            model: encode(texts, batch_size=32), which also sorts by length; texts
                            only

All give the same vectors; the largest 1 - cosine is printed. The time includes tokenization and
decoding of image files.

    python benchmarks/encode.py [--quick] [--model DIR] [--data FILE]
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _bench
import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from vlduet.data import images
from vlduet.data.batches import FORWARD_MAX_TOKENS, group_by_length
from vlduet.data.records import ImageRef, Record, as_parts
from vlduet.model.duet import DuetModel, Embeddable
from vlduet.model.feature_cache import FeatureCache

BATCH_SIZE = 32


def sample_texts(
    records: list[Record], count: int, max_captions: int, rng: random.Random
) -> list[str]:
    """Return texts of 1 to `max_captions` captions each; as in real collections, most are short."""
    captions = [caption for record in records for caption in record.short]
    texts = []
    for _ in range(count):
        num_captions = 1
        if max_captions > 1:
            num_captions = min(max_captions, 1 + int(rng.expovariate(3 / max_captions)))
        texts.append(" ".join(rng.sample(captions, num_captions)))
    return texts


# ------------------------------------------------------------------ vlduet


def encode_packed(model: DuetModel, items: list[Embeddable]) -> np.ndarray:
    """Return the embeddings of items, float32[N, E]."""
    model.feature_cache = FeatureCache(None)  # every repeat pays for the vision tower
    return model.encode(items)


@torch.no_grad()
def encode_padded(model: DuetModel, items: list[Embeddable]) -> np.ndarray:
    """Return the same with one item per row."""
    model.feature_cache = FeatureCache(None)
    model.eval()
    sequences = [model.renderer.render_embedding(as_parts(item)) for item in items]
    embeddings = np.empty((len(items), model.dim), dtype=np.float32)
    for indices in group_by_length([len(s) for s in sequences], FORWARD_MAX_TOKENS):
        batch = model.collate([sequences[i] for i in indices])
        embeddings[indices] = model(batch).embeddings.numpy()
    return embeddings


# ------------------------------------------------------------------ plain transformers


class PlainEncoder:
    """A loop as one would write it without a library: AutoModel and a processor."""

    def __init__(self, folder: Path, duet: DuetModel):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.head = duet.head
        self.prompts = duet.prompts
        image_token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        black = images.from_pixels(np.zeros((8, 8, 3), np.uint8))
        prepared = duet.prepare_image(ImageRef(data=images.encode_png(black)))
        image = image_token * prepared.num_tokens
        self.image_prompt = self.prompts.image.replace("{image}", image)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Return the embeddings of texts, float32[N, E], from their last tokens."""
        embeddings = []
        for begin in range(0, len(texts), BATCH_SIZE):
            batch = texts[begin : begin + BATCH_SIZE]
            prompts = [self.prompts.text.replace("{text}", text) for text in batch]
            inputs = self.tokenizer(
                prompts, padding=True, padding_side="right", return_tensors="pt"
            )
            states = self.model.model(**inputs).last_hidden_state  # [B, T, D]
            last = inputs["attention_mask"].sum(1) - 1
            embeddings.append(self.head(states[torch.arange(len(states)), last]))
        return torch.cat(embeddings).numpy()

    @torch.no_grad()
    def encode_images(self, refs: list[ImageRef]) -> np.ndarray:
        """Return the embeddings of images, float32[N, E]."""
        embeddings = []
        for begin in range(0, len(refs), BATCH_SIZE):
            pictures = [images.load_image(ref) for ref in refs[begin : begin + BATCH_SIZE]]
            pixels = self.image_processor(images=pictures, return_tensors="pt")
            inputs = self.tokenizer([self.image_prompt] * len(pictures), return_tensors="pt")
            states = self.model.model(**inputs, **pixels).last_hidden_state  # [B, T, D]
            embeddings.append(self.head(self._pool(states, inputs["input_ids"])))
        return torch.cat(embeddings).numpy()

    def _pool(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return the last state, or the mean of those of image tokens, [B, T, D] -> [B, D]."""
        if self.prompts.image_pool == "last":
            return states[:, -1]
        is_image = token_ids == self.model.config.image_token_id
        mask = is_image[..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


# ------------------------------------------------------------------ sentence-transformers


def build_sentence_transformer(model: DuetModel, folder: Path) -> Callable[[list[str]], np.ndarray]:
    """Return the `encode` of a SentenceTransformer on the language model, saved to a folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    model.backbone.language_model.save_pretrained(folder)
    model.backbone.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("processor_class", None)  # there is no image processor in this folder
    path.write_text(json.dumps(settings))
    # With a template, every text would become a chat turn.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    modules = [Transformer(str(folder)), Pooling(model.backbone.hidden_size, "lasttoken")]
    if model.head.kind == "linear":
        linear = model.head.layers
        bias = None if linear.bias is None else linear.bias.detach()
        modules.append(
            Dense(
                linear.in_features,
                linear.out_features,
                bias=bias is not None,
                activation_function=torch.nn.Identity(),
                init_weight=linear.weight.detach(),
                init_bias=bias,
            )
        )
    peer = SentenceTransformer(modules=modules, device="cpu")

    def encode(texts: list[str]) -> np.ndarray:
        prompts = [model.prompts.text.replace("{text}", text) for text in texts]
        return peer.encode(
            prompts, batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False
        )

    return encode


# ------------------------------------------------------------------ the run


def compare(
    title: str,
    contenders: dict[str, Callable[[], np.ndarray]],
    *,
    unit: str,
    count: int,
    repeats: int,
) -> None:
    """Compare the vectors of all contenders, then their times, and print both."""
    first, *peers = contenders
    embeddings = {name: contender() for name, contender in contenders.items()}
    seconds = _bench.time_in_turns(contenders, repeats)
    _bench.print_ratios(title, unit, seconds, work=count, reference=first)
    differences = []
    for name in peers:
        cosines = (embeddings[name] * embeddings[first]).sum(1)
        differences.append(f"{name} {float((1 - cosines).max()):.0e}")
    print(f"  largest 1 - cosine to {first}: {', '.join(differences)}", flush=True)


def main() -> None:
    options = _bench.build_parser(__doc__).parse_args()
    folder = _bench.find_model_folder(options.model)
    records = _bench.load_pairs(options.data)
    _bench.print_environment(options, folder)
    model = DuetModel.from_pretrained(folder, device="cpu")
    has_plain_head = model.head.kind in ("linear", "none")
    if model.prompts.chat or not has_plain_head or model.peft_model is not None:
        raise SystemExit(
            "The peers need a merged model with plain prompts and a head that is linear or none."
        )
    plain = PlainEncoder(folder, model)
    rng = random.Random(options.seed)
    count = 24 if options.quick else 96
    repeats = options.repeats or (2 if options.quick else 3)
    refs = [record.image for record in rng.sample(records, count) if record.image is not None]
    with tempfile.TemporaryDirectory() as scratch:
        peer = build_sentence_transformer(model, Path(scratch))
        for title, max_captions in [("texts, captions", 1), ("texts, 1 to 12 captions each", 12)]:
            texts = sample_texts(records, count, max_captions, rng)
            lengths = sorted(len(model.renderer.render_embedding((text,))) for text in texts)
            contenders: dict[str, Callable[[], np.ndarray]] = {
                "vlduet": partial(encode_packed, model, list(texts)),
                "vlduet, padded": partial(encode_padded, model, list(texts)),
                "transformers": partial(plain.encode_texts, texts),
                "sentence-transformers": partial(peer, texts),
            }
            span = f"{lengths[0]} to {lengths[-1]} tokens, {sum(lengths)} in all"
            compare(
                f"{title}: {count}, {span}",
                contenders,
                unit="texts/s",
                count=count,
                repeats=repeats,
            )
    contenders = {
        "vlduet": partial(encode_packed, model, list(refs)),
        "vlduet, padded": partial(encode_padded, model, list(refs)),
        "transformers": partial(plain.encode_images, refs),
    }
    compare(
        f"images: {count}, from files", contenders, unit="images/s", count=count, repeats=repeats
    )


if __name__ == "__main__":
    main()
