"""ImageNet zero-shot classification: images search among the prompts of 1,000 class names."""

from __future__ import annotations

import json
from pathlib import Path

from vlduet.data.records import Parts
from vlduet.errors import DataError
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.tasks import RetrievalTask

PLAIN_TEMPLATE = "a photo of a {}"
CLIP_TEMPLATES = Path(__file__).parent / "clip_templates.json"
"""CLIP's 80 templates; their order does not matter to the mean of their embeddings."""


def load_imagenet(files: OfficialFiles, *, all_templates: bool = False) -> RetrievalTask:
    """Return the task of finding the class of every image of ``imagenet/val/WNID``, by R@1 and R@5.

    Documents are the filled templates, class by class; those of a class are averaged. File hashes
    are stored in `files.hashes`.

    Args:
        files: data folder.
        all_templates: average CLIP's 80 templates per class; otherwise "a photo of a {}" alone.

    Raises:
        DataError: class names or the folder of a class are missing; an empty folder is no error.
    """
    templates = [PLAIN_TEMPLATE]
    if all_templates:
        templates = json.loads(CLIP_TEMPLATES.read_text(encoding="utf-8"))
    class_names = _read_class_names(files)
    queries: list[Parts] = []
    positives: list[tuple[int, ...]] = []
    for label, wnid in enumerate(class_names):
        images = files.list_images(f"imagenet/val/{wnid}")
        queries += [(image,) for image in images]
        positives += [(label,)] * len(images)
    documents: list[Parts] = []
    for name in class_names.values():
        documents += [(template.format(name),) for template in templates]
    return RetrievalTask(
        queries=tuple(queries),
        documents=tuple(documents),
        positives=tuple(positives),
        cutoffs=(1, 5),
        documents_per_class=len(templates),
        details={"templates": len(templates)},
    )


def _read_class_names(files: OfficialFiles) -> dict[str, str]:
    """Return wnid -> class name in the order of labels, and store the file's hash.

    ``imagenet/classnames.txt`` (one name per line; wnids are the sorted folders of
    ``imagenet/val``) is preferred to ``imagenet/imagenet_class_index.json``, in whose names ``_``
    becomes a blank.

    Raises:
        DataError: a file or the folder is missing, or the numbers of names and folders differ.
    """
    if files.has_file("imagenet/classnames.txt"):
        folders = files.find_path("imagenet/val").iterdir()
        wnids = sorted(path.name for path in folders if path.is_dir())
        names = files.read_text("imagenet/classnames.txt").splitlines()
        if len(names) != len(wnids):
            raise DataError(
                f"{len(names)} names for {len(wnids)} folders",
                place=files.root / "imagenet/classnames.txt",
                fix="Write one name per line, by sorted wnid",
            )
        return dict(zip(wnids, names, strict=True))
    index = files.read_object("imagenet/imagenet_class_index.json")
    entries = [index[str(label)] for label in range(len(index))]
    return {wnid: name.replace("_", " ") for wnid, name in entries}
