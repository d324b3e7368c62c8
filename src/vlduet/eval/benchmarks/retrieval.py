"""Image-text retrieval and zero-shot classification: COCO, Flickr30k, nocaps, VIST, ImageNet.

A query counts at k if any right item is among the first k (CLIP's convention, E5-V's and VladVA's R@k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlduet.data.records import ImageRef, Parts
from vlduet.errors import DataError
from vlduet.eval.benchmarks.source import UNCHANGED, Fields, Source
from vlduet.eval.benchmarks.tasks import Search

BOTH = ("t2i", "i2t")


def karpathy(
    name: str, folders: Sequence[str], *, captions: int | None, unique: bool = False
) -> Callable[[Source], Search]:
    """A loader of the test split of a Karpathy file.

    Args:
        name: the file, as ``coco/dataset_coco.json``.
        folders: where its images may lie; ``{filepath}`` is the record's.
        captions: how many of an image's captions are used, in file order; None for all.
        unique: equal captions are one query with several right images (24,809 on COCO: UniIR's variant).
    """

    def load(source: Source) -> Search:
        images: list[ImageRef] = []
        texts: list[tuple[int, str]] = []
        for row in source.object(name).each("images"):
            if row["split"] == "test":
                places = [
                    f"{f.format(filepath=row.get('filepath', ''))}/{row['filename']}"
                    for f in folders
                ]
                sentences = [sentence["raw"].strip() for sentence in row.each("sentences")]
                texts += [(len(images), text) for text in sentences[:captions] if text]
                images.append(source.image(*places))
        return both_ways(images, texts, unique=unique)

    return load


def both_ways(
    images: Sequence[ImageRef], texts: Sequence[tuple[int, str]], *, unique: bool
) -> Search:
    """Texts against images and back; texts are (index of their image, text). Raises DataError for none."""
    if not images or not texts:
        raise DataError("no captioned images of the test split", fix=UNCHANGED)
    if unique:
        owners: dict[str, list[int]] = {}
        for image, text in texts:
            owners.setdefault(text, []).append(image)
        queries, positives = (
            list(owners),
            [tuple(dict.fromkeys(found)) for found in owners.values()],
        )
    else:
        queries, positives = [text for _, text in texts], [(image,) for image, _ in texts]
    return Search(
        queries=tuple((text,) for text in queries),
        documents=tuple((image,) for image in images),
        positives=tuple(positives),
        directions=BOTH,
    )


def nocaps(captions: int | None) -> Callable[[Source], Search]:
    """A loader of nocaps val with so many captions an image, in file order; None for all ten."""

    def load(source: Source) -> Search:
        file = source.object("nocaps/nocaps_val_4500_captions.json")
        told: dict[int, list[str]] = {}
        for row in file.each("annotations"):
            told.setdefault(row["image_id"], []).append(row["caption"].strip())
        images: list[ImageRef] = []
        texts: list[tuple[int, str]] = []
        for row in file.each("images"):
            texts += [(len(images), text) for text in told.get(row["id"], [])[:captions]]
            images.append(source.image(f"nocaps/images/{row['file_name']}"))
        return both_ways(images, texts, unique=False)

    return load


# ------------------------------------------------------------------ VIST

STORY = "vist/sis/val.story-in-sequence.json"


def vist(*, captions: int, context: bool, unseen: bool) -> Callable[[Source], Search]:
    """FROMAGe's protocol on VIST val: find the image of a story's last caption.

    Args:
        captions: 1 for the last one alone, 5 for all.
        context: the four images before it stand in the query too, each after its caption.
        unseen: those four images may not be found (the dagger in the papers' tables).
    """

    def load(source: Source) -> Search:
        file = source.object(STORY)
        places = {
            row["id"]: f"vist/images/val/{row['id']}"
            for row in file.each("images")
            if row.get("url_o")
        }
        found = {
            key: [f"{place}{s}" for s in (".jpg", ".png", ".gif", ".jpeg")]
            for key, place in places.items()
        }
        gallery = {
            key: ImageRef(path=source.root / name)
            for key, names in found.items()
            for name in names
            if source.holds(name)
        }
        stories = _stories(file)
        kept = [story for story in stories if all(image in gallery for image, _ in story)]
        if not kept:
            raise DataError(
                "no story has all its images",
                place=source.root / "vist/images/val",
                fix="Unpack them there",
            )
        number = {key: i for i, key in enumerate(gallery)}
        queries: list[Parts] = []
        for story in kept:
            *before, (_, last) = story
            told: list[str | ImageRef] = []
            for image, text in before if captions > 1 else ():
                told += [text, gallery[image]] if context else [text]
            queries.append((*told, last))
        return Search(
            queries=tuple(queries),
            documents=tuple((image,) for image in gallery.values()),
            positives=tuple((number[story[-1][0]],) for story in kept),
            excluded=tuple(
                tuple({number[image] for image, _ in story[:-1]} - {number[story[-1][0]]})
                for story in kept
            )
            if unseen
            else (),
            facts={"stories": len(kept), "stories_without_an_image": len(stories) - len(kept)},
        )

    return load


def _stories(file: Fields) -> list[list[tuple[str, str]]]:
    """(image, caption) of every story, in file order: officially nothing is sorted."""
    found: dict[str, list[tuple[str, str]]] = {}
    for i, group in enumerate(file["annotations"]):
        row = Fields(group[0], file.place.with_field(f"annotations[{i}][0]"))
        found.setdefault(row["story_id"], []).append((row["photo_flickr_id"], row["text"]))
    return list(found.values())


# ------------------------------------------------------------------ ImageNet

PLAIN = ("a photo of a {}",)

_OF_A = (
    "a bad photo of a|a photo of many|a sculpture of a|a photo of the hard to see|a low resolution photo of the|"
    "a rendering of a|graffiti of a|a bad photo of the|a cropped photo of the|a tattoo of a|the embroidered|"
    "a photo of a hard to see|a bright photo of a|a photo of a clean|a photo of a dirty|a dark photo of the|"
    "a drawing of a|a photo of my|the plastic|a photo of the cool|a close-up photo of a|a black and white photo of the|"
    "a painting of the|a painting of a|a pixelated photo of the|a sculpture of the|a bright photo of the|"
    "a cropped photo of a|a plastic|a photo of the dirty|a jpeg corrupted photo of a|a blurry photo of the|"
    "a photo of the|a good photo of the|a rendering of the|a photo of one|a doodle of a|a close-up photo of the|"
    "a photo of a|the origami|a sketch of a|a doodle of the|a origami|a low resolution photo of a|the toy|"
    "a rendition of the|a photo of the clean|a photo of a large|a rendition of a|a photo of a nice|a photo of a weird|"
    "a blurry photo of a|a cartoon|art of a|a sketch of the|a embroidered|a pixelated photo of a|itap of the|"
    "a jpeg corrupted photo of the|a good photo of a|a plushie|a photo of the nice|a photo of the small|"
    "a photo of the weird|the cartoon|art of the|a drawing of the|a photo of the large|a black and white photo of a|"
    "the plushie|a dark photo of a|itap of a|graffiti of the|a toy|itap of my|a photo of a cool|a photo of a small|"
    "a tattoo of the"
)
CLIP_80 = (
    *(f"{start} {{}}." for start in _OF_A.split("|")),
    "a {} in a video game.",
    "the {} in a video game.",
)
"""CLIP's 80 templates; their order does not matter to their mean."""


def imagenet(templates: Sequence[str]) -> Callable[[Source], Search]:
    """ILSVRC2012 val as ``val/WNID/*.JPEG``; classes are named by ``imagenet_class_index.json`` or ``classnames.txt``."""

    def load(source: Source) -> Search:
        names = _class_names(source)
        queries: list[Parts] = []
        positives: list[tuple[int, ...]] = []
        for label, wnid in enumerate(names):
            images = source.images_in(f"imagenet/val/{wnid}")
            queries += [(image,) for image in images]
            positives += [(label,)] * len(images)
        documents = [(template.format(name),) for name in names.values() for template in templates]
        return Search(
            queries=tuple(queries),
            documents=tuple(documents),
            positives=tuple(positives),
            ks=(1, 5),
            ensemble=len(templates),
            facts={"templates": len(templates)},
        )

    return load


def _class_names(source: Source) -> dict[str, str]:
    """wnid -> name, in the order of labels."""
    if source.has("imagenet/classnames.txt"):
        folders = sorted(
            path.name for path in source.path("imagenet/val").iterdir() if path.is_dir()
        )
        names = source.text("imagenet/classnames.txt").splitlines()
        if len(names) != len(folders):
            what = f"{len(names)} names for {len(folders)} folders"
            raise DataError(
                what,
                place=source.root / "imagenet/classnames.txt",
                fix="One name a line, by sorted wnid",
            )
        return dict(zip(folders, names, strict=True))
    index = source.object("imagenet/imagenet_class_index.json")
    return {index[str(i)][0]: index[str(i)][1].replace("_", " ") for i in range(len(index))}
