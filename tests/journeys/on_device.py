"""The whole road on one device, in a process of its own: python on_device.py cpu|pretend FAMILY FOLDER.

FOLDER holds what `test_device.files` wrote; every verb's output is left there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

PROMPTS = [f"model.prompts.{kind}=<s>{{{kind}}} sum" for kind in ("image", "text", "parts")]
JUDGES = [f"encoders.{role}=judges/{role}" for role in ("vision", "text", "cross")]
SUGAR = [
    "recipe={name: sugar}",
    "objectives={structure: 1, language: 1}",
    "model.prompts.image_pool=mean",
    *JUDGES,
]
CLIP = [
    "recipe={name: clip}",
    "objectives={contrastive: 1}",
    "train.lora=null",
    "train.projector=false",
    *JUDGES[:2],
]
GUIDED = [
    "recipe={name: vladva, guide: triple}",
    *JUDGES,
    "train.soft_prompts=true",
    *PROMPTS,
    "train.pack=90",
]
BENCHMARKS = ["coco", "winoground", "seedbench_likelihood", "pope", "fvqa"]
ROAD: dict[str, list[str]] = {
    "train": ["train", "config.yaml", *GUIDED],
    "resume": ["train", "config.yaml", "--resume", *GUIDED],
    "chunks": [
        "train",
        "config.yaml",
        *SUGAR,
        "train.chunk_tokens=120",
        "train.checkpointing=true",
        "out=sugar",
    ],
    "clip": ["train", "config.yaml", *CLIP, "out=clip"],
    "info": ["model", "info", "run/model", "--json"],
    "merge": ["model", "merge", "run/model", "merged"],
    "encode": ["encode", "run/model", "train.jsonl", "--out", "vectors.npz"],
    "encode the export": [
        "encode",
        "merged",
        "documents.jsonl",
        "--side",
        "record",
        "--out",
        "merged.npz",
    ],
    "encode by towers": ["encode", "clip/model", "photos", "--out", "clip.npz"],
    "index": ["index", "run/model", "photos", "--to", "index", "--json"],
    "search": ["search", "index", "number", "--image", "3.png", "--json"],
    "ask": ["ask", "index", "what is it?", "--max-new-tokens", "8", "--json"],
    "caption": [
        "caption",
        "run/model",
        "photos",
        "--to",
        "captions.jsonl",
        "--long",
        "0",
        "--prompt",
        "",
    ],
    "mine": ["mine", "run/model", "train.jsonl", "--to", "mined.jsonl", "-k", "1", "--margin", "0"],
    "analyse": ["analyse", "run/model", "val.jsonl", "--to", "analysis"],
    "align": ["align", "documents.jsonl:0", "documents.jsonl:1", "--model", "run/model", "--json"],
    "eval": ["eval", "run/model", *BENCHMARKS, "--data", "official", "--to", "evaluated", "--json"],
}


def main() -> None:
    device, folder = sys.argv[1], Path(sys.argv[2])
    if device == "pretend":
        from helpers import pretend_device

        keep = pretend_device.register_device()
        assert keep
    from vlduet.cli.main import app

    os.chdir(folder)
    for name, words in ROAD.items():
        with (folder / f"{name}.out").open("w") as file, contextlib.redirect_stdout(file):
            app(words, standalone_mode=False)


if __name__ == "__main__":
    main()
