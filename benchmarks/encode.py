"""Embedding texts and images: vlduet against plain transformers and sentence-transformers, on the same weights.

    vlduet                  DuetModel.encode(items): batches of like length, by token budget, short items packed into rows
    vlduet, padded          the same batches, an item a row
    transformers            batches of 32 in the order given, padded to the longest; one `model.model(...)` a batch; the
                            states are pooled by hand, then the head
    sentence-transformers   SentenceTransformer([Transformer, Pooling, Dense]) over the same language model: encode(texts,
                            batch_size=32), which sorts by length too; texts only

All give the same vectors, and the largest 1 - cosine is printed. What is timed begins with strings and image files.

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

BATCH = 32


def texts_of(records: list[Record], count: int, longest: int, rng: random.Random) -> list[str]:
    """Texts of 1 to `longest` captions each: short ones are common, long ones are there, as in real collections."""
    captions = [caption for record in records for caption in record.short]
    sizes = [
        min(longest, 1 + int(rng.expovariate(3 / longest))) if longest > 1 else 1
        for _ in range(count)
    ]
    return [" ".join(rng.sample(captions, size)) for size in sizes]


# ------------------------------------------------------------------ vlduet


def ours(model: DuetModel, items: list[Embeddable]) -> np.ndarray:
    model.feature_cache = FeatureCache(None)  # every repeat pays for the vision tower
    return model.encode(items)


@torch.no_grad()
def ours_padded(model: DuetModel, items: list[Embeddable]) -> np.ndarray:
    model.feature_cache = FeatureCache(None)
    sequences = [model.renderer.render_embedding(as_parts(item)) for item in items]
    vectors = np.empty((len(items), model.dim), dtype=np.float32)
    for chosen in group_by_length([len(s) for s in sequences], FORWARD_MAX_TOKENS):
        vectors[chosen] = model.eval()(
            model.collate([sequences[i] for i in chosen])
        ).embeddings.numpy()
    return vectors


# ------------------------------------------------------------------ plain transformers


class Plain:
    """What one writes without a library: AutoModel, a processor, a loop."""

    def __init__(self, folder: Path, model: DuetModel):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.head, self.prompts = model.head, model.prompts
        self.image_token = self.tokenizer.convert_ids_to_tokens(model.backbone.image_token_id)
        self.image_tokens = (
            len(model.renderer.render_embedding((pixel(),)).images)
            and model.prepare_image(pixel()).num_tokens
        )

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        found = []
        for begin in range(0, len(texts), BATCH):
            prompts = [
                self.prompts.text.replace("{text}", text) for text in texts[begin : begin + BATCH]
            ]
            inputs = self.tokenizer(
                prompts, padding=True, padding_side="right", return_tensors="pt"
            )
            states = self.model.model(**inputs).last_hidden_state  # [B, T, D]
            last = inputs["attention_mask"].sum(1) - 1
            found.append(self.head(states[torch.arange(len(states)), last]))
        return torch.cat(found).numpy()

    @torch.no_grad()
    def images(self, refs: list[ImageRef]) -> np.ndarray:
        found = []
        for begin in range(0, len(refs), BATCH):
            pictures = [images.load_image(ref) for ref in refs[begin : begin + BATCH]]
            pixels = self.processor(images=pictures, return_tensors="pt")
            prompt = self.prompts.image.replace("{image}", self.image_token * self.image_tokens)
            inputs = self.tokenizer([prompt] * len(pictures), return_tensors="pt")
            states = self.model.model(**inputs, **pixels).last_hidden_state  # [B, T, D]
            found.append(self.head(self.pool(states, inputs["input_ids"])))
        return torch.cat(found).numpy()

    def pool(self, states: Tensor, ids: Tensor) -> Tensor:
        if self.prompts.image_pool == "last":
            return states[:, -1]
        mask = (ids == self.model.config.image_token_id)[..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


def pixel() -> ImageRef:
    return ImageRef(data=images.encode_png(images.from_pixels(np.zeros((8, 8, 3), np.uint8))))


# ------------------------------------------------------------------ sentence-transformers


def sentence_transformer(model: DuetModel, folder: Path) -> Callable[[list[str]], np.ndarray]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    model.backbone.language_model.save_pretrained(folder)
    model.backbone.tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("processor_class", None)  # it stands alone now, without images
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(
        missing_ok=True
    )  # or every text would become a chat turn
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
            prompts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
        )

    return encode


# ------------------------------------------------------------------ the run


def compare(
    title: str, contenders: dict[str, Callable[[], np.ndarray]], *, count: int, repeats: int
) -> None:
    """Warm up and compare the vectors, then the times."""
    first = next(iter(contenders))
    found = {name: contender() for name, contender in contenders.items()}
    worst = {
        name: float((1 - (vectors * found[first]).sum(1)).max()) for name, vectors in found.items()
    }
    seconds = _bench.interleaved(contenders, repeats)
    _bench.table(
        title, f"{title.split(maxsplit=1)[0].strip(',:')}/s", seconds, work=count, ours=first
    )
    agree = ", ".join(f"{name} {value:.0e}" for name, value in worst.items() if name != first)
    print(f"  largest 1 - cosine to {first}: {agree}", flush=True)


def main() -> None:
    options = _bench.arguments(__doc__).parse_args()
    folder = _bench.model_folder(options.model)
    records = _bench.pairs(options.data)
    _bench.facts(options, folder)
    model = DuetModel.from_pretrained(folder, device="cpu")
    if (
        model.prompts.chat
        or model.head.kind not in ("linear", "none")
        or model.peft_model is not None
    ):
        raise SystemExit(
            "the peers are written for a merged model whose prompts are plain and whose head is linear or none"
        )
    plain = Plain(folder, model)
    rng = random.Random(options.seed)
    count, pictures, repeats = (24, 24, 2) if options.quick else (96, 96, 3)
    repeats = options.repeats or repeats
    refs = [record.image for record in rng.sample(records, pictures) if record.image is not None]
    with tempfile.TemporaryDirectory() as scratch:
        peer = sentence_transformer(model, Path(scratch))
        for title, longest in [("texts, captions", 1), ("texts, 1 to 12 captions each", 12)]:
            texts = texts_of(records, count, longest, rng)
            lengths = sorted(len(model.renderer.render_embedding((text,))) for text in texts)
            what = f"{title}: {count}, {lengths[0]} to {lengths[-1]} tokens, {sum(lengths)} in all"
            contenders: dict[str, Callable[[], np.ndarray]] = {
                "vlduet": partial(ours, model, list(texts)),
                "vlduet, padded": partial(ours_padded, model, list(texts)),
            }
            contenders |= {
                "transformers": partial(plain.texts, texts),
                "sentence-transformers": partial(peer, texts),
            }
            compare(what, contenders, count=count, repeats=repeats)
    contenders = {
        "vlduet": partial(ours, model, list(refs)),
        "vlduet, padded": partial(ours_padded, model, list(refs)),
        "transformers": partial(plain.images, refs),
    }
    compare(f"images: {pictures}, from files", contenders, count=pictures, repeats=repeats)


if __name__ == "__main__":
    main()
