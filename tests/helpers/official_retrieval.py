"""Mini versions of retrieval and compositional benchmarks in their official formats."""

from __future__ import annotations

import csv
import io
from typing import Any

from helpers.official_writer import OfficialWriter


def write_retrieval(writer: OfficialWriter) -> None:
    """Write COCO, Flickr30k, nocaps, VIST and ImageNet."""
    write_karpathy_files(writer)
    write_nocaps(writer)
    write_vist(writer)
    write_imagenet(writer)


def write_karpathy_files(writer: OfficialWriter) -> None:
    """Write COCO (4 images, "A flower." on two of them, one record of training) and Flickr30k."""
    rows = []
    for i in range(4):
        name = f"COCO_val2014_{i:012d}.jpg"
        writer.write_image(f"coco/val2014/{name}")
        captions = [f"caption {j} of image {i}" for j in range(6)]
        if i < 2:
            captions[0] = "A flower. "
        sentences = [
            {"tokens": caption.split(), "raw": caption, "imgid": i, "sentid": j}
            for j, caption in enumerate(captions)
        ]
        row: dict[str, Any] = {"filepath": "val2014", "filename": name, "imgid": i, "cocoid": i}
        row |= {"split": "test", "sentids": list(range(6)), "sentences": sentences}
        rows.append(row)
    training_row = {**rows[0], "split": "train", "filename": "absent.jpg"}
    coco = {"images": [training_row, *rows], "dataset": "coco"}
    writer.write_json("coco/dataset_coco.json", coco)
    flickr = []
    for i in range(3):
        writer.write_image(f"flickr30k/flickr30k-images/{i}.jpg")
        sentences = [{"raw": f"Person {i} does {j}."} for j in range(5)]
        flickr.append({"filename": f"{i}.jpg", "split": "test", "sentences": sentences})
    flickr_file = {"images": flickr, "dataset": "flickr30k"}
    writer.write_json("flickr30k/dataset_flickr30k.json", flickr_file)


def write_nocaps(writer: OfficialWriter) -> None:
    """Write nocaps with 3 images of 10 captions."""
    images = []
    annotations = []
    for i in range(3):
        name = f"{i:016x}.jpg"
        writer.write_image(f"nocaps/images/{name}")
        images.append({"id": i, "file_name": name, "domain": "near-domain"})
        for j in range(10):
            annotations.append({"id": 10 * i + j, "image_id": i, "caption": f"No {i} {j}"})
    content = {"images": images, "annotations": annotations}
    writer.write_json("nocaps/nocaps_val_4500_captions.json", content)


def write_vist(writer: OfficialWriter) -> None:
    """Write VIST with three stories.

    The last image of the second story is missing, and the first image is in two stories.
    """
    stories = [
        ["1", "2", "3", "4", "5"],
        ["6", "7", "8", "9", "missing"],
        ["1", "10", "11", "12", "13"],
    ]
    image_ids: dict[str, None] = {}
    annotations = []
    for s, story in enumerate(stories):
        image_ids |= dict.fromkeys(story)
        for i, image in enumerate(story):
            text = f"story {s} sentence {i} ."
            annotation = {"story_id": str(100 + s), "storylet_id": f"{s}{i}"}
            annotation |= {"photo_flickr_id": image, "text": text, "original_text": ""}
            annotations.append([annotation | {"album_id": "1", "worker_arranged_photo_order": i}])
    for image in image_ids:
        if image != "missing":
            writer.write_image(f"vist/images/val/{image}.jpg")
    images = [{"id": image, "url_o": f"https://example.org/{image}.jpg"} for image in image_ids]
    content = {"images": [*images, {"id": "no-url"}], "annotations": annotations}
    writer.write_json("vist/sis/val.story-in-sequence.json", content)


def write_imagenet(writer: OfficialWriter) -> None:
    """Write ImageNet with three classes of two images."""
    index = {
        "0": ["n01440764", "tench"],
        "1": ["n01443537", "goldfish"],
        "2": ["n01484850", "great_white_shark"],
    }
    for wnid, _ in index.values():
        for i in range(2):
            writer.write_image(f"imagenet/val/{wnid}/ILSVRC2012_val_{wnid}_{i}.JPEG")
    writer.write_json("imagenet/imagenet_class_index.json", index)


def write_compositional(writer: OfficialWriter) -> None:
    """Write Winoground, SugarCrepe, SugarCrepe++ and MMVP-VLM."""
    rows = []
    for i in range(3):
        row: dict[str, Any] = {"id": i, "tag": "Noun", "secondary_tag": "", "num_main_preds": 1}
        for side in (0, 1):
            writer.write_image(f"winoground/images/ex_{i}_img_{side}.png")
            row[f"image_{side}"] = f"ex_{i}_img_{side}"
        row["caption_0"] = "some plants surrounding a lightbulb"
        row["caption_1"] = "a lightbulb surrounding some plants"
        row["collapsed_tag"] = "Object" if i else "Relation"
        rows.append(row)
    writer.write_json_lines("winoground/examples.jsonl", rows)
    write_sugarcrepe(writer)
    table_file = io.StringIO()
    table = csv.writer(table_file)
    table.writerow(["Question ID", "Type", "Statement"])
    for n in range(1, 5):
        pattern = "Orientation and Direction" if n < 3 else "State and Condition"
        table.writerow([n, pattern, f"statement {n}"])
        writer.write_image(f"mmvp_vlm/MMVP_VLM_Images/{pattern}/{n}.jpg")
    writer.write_file("mmvp_vlm/Questions.csv", table_file.getvalue())


def write_sugarcrepe(writer: OfficialWriter) -> None:
    """Write two items of every subset of SugarCrepe, and one of SugarCrepe++."""
    for i in range(2):
        writer.write_image(f"coco/val2017/{i:012d}.jpg")
    item = {
        "filename": "000000000000.jpg",
        "caption": "A cat sits on its hind legs, and swats at the plant.",
        "negative_caption": "A cat sits on the plant, and swats at its hind legs.",
    }
    other_item = {**item, "filename": "000000000001.jpg"}
    row = {"id": 0, **item, "caption2": "On its hind legs a cat swats at the plant."}
    shared_subsets = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
    for subset in ("add_att", "add_obj", *shared_subsets):
        writer.write_json(f"sugarcrepe/{subset}.json", {"0": item, "1": other_item})
    for subset in shared_subsets:
        writer.write_json(f"sugarcrepe_pp/{subset}.json", [row])
