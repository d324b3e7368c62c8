"""All commands on one device, in a process of its own: python on_device.py cpu|pretend FOLDER.

FOLDER holds the files of `test_device.write_inputs`; the output of every command goes to
FOLDER/NAME.out.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from pathlib import Path

VLADVA_OVERRIDES = [
    "recipe={name: vladva, guide: triple}",
    "encoders={vision: encoders/vision, text: encoders/text, cross: encoders/cross}",
    "train.soft_prompts=true",
    "model.prompts.image=<s>{image} sum",
    "model.prompts.text=<s>{text} sum",
    "model.prompts.parts=<s>{parts} sum",
    "train.pack=90",
]
SUGAR_OVERRIDES = [
    "recipe={name: sugar}",
    "objectives={structure: 1, language: 1}",
    "encoders={vision: encoders/vision, text: encoders/text, cross: encoders/cross}",
    "model.prompts.image_pool=mean",
    "train.chunk_tokens=120",
    "train.checkpointing=true",
    "out=sugar",
]
CLIP_OVERRIDES = [
    "recipe={name: clip}",
    "objectives={contrastive: 1}",
    "encoders={vision: encoders/vision, text: encoders/text}",
    "train.lora=null",
    "train.projector=false",
    "out=clip",
]
BENCHMARKS = "coco winoground seedbench_likelihood pope fvqa"
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "config.yaml", *VLADVA_OVERRIDES],
    "resume": ["train", "config.yaml", "--resume", *VLADVA_OVERRIDES],
    "train sugar": ["train", "config.yaml", *SUGAR_OVERRIDES],
    "train clip": ["train", "config.yaml", *CLIP_OVERRIDES],
    "info": shlex.split("model info run/model --json"),
    "merge": shlex.split("model merge run/model merged"),
    "encode": shlex.split("encode run/model train.jsonl --out vectors.npz"),
    "encode merged": shlex.split("encode merged documents.jsonl --side record --out merged.npz"),
    "encode clip": shlex.split("encode clip/model photos --out clip.npz"),
    "index": shlex.split("index run/model photos --to index --json"),
    "search": shlex.split("search index number --image 3.png --json"),
    "ask": shlex.split("ask index 'what is it?' --max-new-tokens 8 --json"),
    "caption": shlex.split("caption run/model photos --to captions.jsonl --long 0 --prompt ''"),
    "mine": shlex.split("mine run/model train.jsonl --to mined.jsonl -k 1 --margin 0"),
    "analyse": shlex.split("analyse run/model val.jsonl --to analysis"),
    "align": shlex.split("align documents.jsonl:0 documents.jsonl:1 --model run/model --json"),
    "eval": shlex.split(f"eval run/model {BENCHMARKS} --data official --to evaluated --json"),
}
"""Arguments of `vlduet` by the name of the output; later commands use the files of earlier ones."""


def main() -> None:
    device, folder = sys.argv[1], Path(sys.argv[2])
    if device == "pretend":
        from helpers import pretend_device

        registration = pretend_device.register_device()  # must live as long as the process
        assert registration
    from vlduet.cli.main import app

    os.chdir(folder)
    for name, arguments in COMMANDS.items():
        with (folder / f"{name}.out").open("w") as file, contextlib.redirect_stdout(file):
            app(arguments, standalone_mode=False)


if __name__ == "__main__":
    main()
