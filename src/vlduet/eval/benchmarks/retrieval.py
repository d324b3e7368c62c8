"""Image-text retrieval: COCO, Flickr30k, nocaps, and stories of VIST.

A query counts at k if any correct item is among the first k (CLIP's convention, and R@k of E5-V
and VladVA).
"""

from __future__ import annotations

from collections.abc import Sequence

from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import DataError
from vlduet.eval.benchmarks.official_files import USE_OFFICIAL_FILE, OfficialFiles, OfficialObject
from vlduet.eval.benchmarks.tasks import RetrievalTask

BOTH_DIRECTIONS = ("t2i", "i2t")


def load_karpathy(
    files: OfficialFiles,
    *,
    annotations: str,
    image_folders: Sequence[str],
    max_captions: int | None = None,
    merge_equal_captions: bool = False,
) -> RetrievalTask:
    """Return the task of finding images by captions, and the reverse, on a Karpathy test split.

    Captions are stripped, and empty ones dropped; an image without any stays in the gallery. The
    hash of the annotations is stored in `files.hashes`.

    Args:
        files: data folder.
        annotations: name of the file, such as ``coco/dataset_coco.json``.
        image_folders: folders in which an image is searched, in this order; ``{filepath}`` stands
            for the record's own field.
        max_captions: number of captions used per image, in file order; None for all.
        merge_equal_captions: see `make_caption_retrieval`; gives 24,809 queries on COCO (UniIR).

    Raises:
        DataError: the file or an image is missing, or the test split is empty.
    """
    images: list[ImageRef] = []
    captions: list[tuple[int, str]] = []
    for row in files.read_object(annotations).get_objects("images"):
        if row["split"] != "test":
            continue
        filepath = row.get("filepath", "")
        folders = [folder.format(filepath=filepath) for folder in image_folders]
        sentences = [sentence["raw"].strip() for sentence in row.get_objects("sentences")]
        captions += [(len(images), text) for text in sentences[:max_captions] if text]
        images.append(files.find_image(*(f"{folder}/{row['filename']}" for folder in folders)))
    return make_caption_retrieval(images, captions, merge_equal_captions=merge_equal_captions)


def make_caption_retrieval(
    images: Sequence[ImageRef],
    captions: Sequence[tuple[int, str]],
    *,
    merge_equal_captions: bool = False,
) -> RetrievalTask:
    """Return the task of finding images by captions (``t2i``), and captions by images (``i2t``).

    Queries are the captions and documents the images, in the given order.

    Args:
        images: the gallery; an image may have no caption.
        captions: (index of the image, caption) pairs.
        merge_equal_captions: make equal captions one query with several correct images, at the
            place of the first.

    Raises:
        DataError: no images or no captions.
    """
    if not images or not captions:
        raise DataError("no captioned images of the test split", fix=USE_OFFICIAL_FILE)
    texts = [text for _, text in captions]
    positives: list[tuple[int, ...]] = [(image,) for image, _ in captions]
    if merge_equal_captions:
        images_of: dict[str, list[int]] = {}
        for image, text in captions:
            images_of.setdefault(text, []).append(image)
        texts = list(images_of)
        positives = [tuple(dict.fromkeys(indices)) for indices in images_of.values()]
    return RetrievalTask(
        queries=tuple((text,) for text in texts),
        documents=tuple((image,) for image in images),
        positives=tuple(positives),
        directions=BOTH_DIRECTIONS,
    )


def load_nocaps(files: OfficialFiles, *, max_captions: int | None = None) -> RetrievalTask:
    """Return the task of finding images by captions, and the reverse, on nocaps val.

    The first `max_captions` captions of every image are used, or all ten for None. File hashes are
    stored in `files.hashes`; a missing file or image raises DataError.
    """
    annotations = files.read_object("nocaps/nocaps_val_4500_captions.json")
    captions_of: dict[int, list[str]] = {}
    for row in annotations.get_objects("annotations"):
        captions_of.setdefault(row["image_id"], []).append(row["caption"].strip())
    images: list[ImageRef] = []
    captions: list[tuple[int, str]] = []
    for row in annotations.get_objects("images"):
        texts = captions_of.get(row["id"], [])[:max_captions]
        captions += [(len(images), text) for text in texts]
        images.append(files.find_image(f"nocaps/images/{row['file_name']}"))
    return make_caption_retrieval(images, captions)


# ------------------------------------------------------------------ VIST

VIST_STORIES = "vist/sis/val.story-in-sequence.json"
VIST_IMAGES = "vist/images/val"

Story = list[tuple[str, str]]
"""(image id, caption) of a story's images, in file order."""


def load_vist(
    files: OfficialFiles,
    *,
    num_captions: int,
    with_images: bool = False,
    exclude_seen: bool = False,
) -> RetrievalTask:
    """Return VIST val as FROMAGe uses it: find the image of a story's last caption.

    Documents are all images that exist, also of stories that are left out because they lack another
    image. The details count used stories (``stories``) and the others
    (``stories_without_an_image``). The hash of the annotations is stored in `files.hashes`.

    Args:
        files: data folder.
        num_captions: 1 for the last caption alone; any larger number, such as 5, for all.
        with_images: put the images before it into the query too, each after its caption; without
            effect if `num_captions` is 1.
        exclude_seen: remove those images from the query's gallery (the dagger in the papers'
            tables), whatever the query shows.

    Raises:
        DataError: the annotations are missing or broken, or no story has all its images.
    """
    annotations = files.read_object(VIST_STORIES)
    gallery = _find_vist_images(files, annotations)
    all_stories = _read_stories(annotations)
    stories = [story for story in all_stories if gallery.keys() >= dict(story).keys()]
    if not stories:
        place = files.root / VIST_IMAGES
        raise DataError("no story has all its images", place=place, fix="Unpack them there")
    index_of = {image: i for i, image in enumerate(gallery)}
    queries: list[Parts] = []
    positives: list[tuple[int, ...]] = []
    excluded: list[tuple[int, ...]] = []
    for *earlier, (last_image, last_caption) in stories:
        query: list[Part] = []
        for image, caption in earlier if num_captions > 1 else ():
            query.append(caption)
            if with_images:
                query.append(gallery[image])
        queries.append((*query, last_caption))
        positives.append((index_of[last_image],))
        excluded.append(tuple({index_of[image] for image, _ in earlier} - {index_of[last_image]}))
    num_incomplete = len(all_stories) - len(stories)
    return RetrievalTask(
        queries=tuple(queries),
        documents=tuple((image,) for image in gallery.values()),
        positives=tuple(positives),
        excluded_documents=tuple(excluded) if exclude_seen else (),
        details={"stories": len(stories), "stories_without_an_image": num_incomplete},
    )


def _find_vist_images(files: OfficialFiles, annotations: OfficialObject) -> dict[str, ImageRef]:
    """Return image id -> image, in file order, for images with an original URL whose file exists.

    Of files with several suffixes, the last of ``.jpg``, ``.png``, ``.gif``, ``.jpeg`` counts.
    """
    images = {}
    for row in annotations.get_objects("images"):
        if not row.get("url_o"):
            continue
        for suffix in (".jpg", ".png", ".gif", ".jpeg"):
            name = f"{VIST_IMAGES}/{row['id']}{suffix}"
            if files.has_image(name):
                images[row["id"]] = ImageRef(path=files.root / name)
    return images


def _read_stories(annotations: OfficialObject) -> list[Story]:
    """Return every story; as in the official code, its captions keep their file order.

    Stories are in the order of their first caption. A missing field raises DataError.
    """
    stories: dict[str, Story] = {}
    for i, group in enumerate(annotations["annotations"]):
        row = OfficialObject(group[0], annotations.place.with_field(f"annotations[{i}][0]"))
        stories.setdefault(row["story_id"], []).append((row["photo_flickr_id"], row["text"]))
    return list(stories.values())
