"""A joint step of a model as large as LLaVA-1.5-7B, of random weights, in bfloat16: vlduet against transformers + peft.

The contenders are those of `train_step.py`, row a, with every layer computed twice (gradient checkpointing):

    vlduet, packed 1024           one forward, both losses read from it; vision features cached
    vlduet, a pass for each loss  train.fused=false
    transformers + peft           three padded passes, full logits

MFU is the share of the device's speed that a step makes use of: the operations that the two losses need, each token once,
by the time of a step, against a product of two matrices in the same precision, measured in the same run. Recomputed layers,
padding, and a second pass over an image are no use.

    python benchmarks/large.py [--tiny] [--data FILE]

Needs a GPU of 80 GB, and 30 GB on the disk until the model is built. --tiny: two layers, on whatever there is, for a look.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import _bench
import torch
import train_step
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlduet.data.records import Record
from vlduet.data.sequences import IGNORE_INDEX
from vlduet.data.stream import Sample
from vlduet.logs import install_log_handler
from vlduet.model.backbone import load_backbone, select_device
from vlduet.model.duet import DuetModel
from vlduet.model.nano import PROMPTS
from vlduet.recipes import vladva


@dataclass(frozen=True)
class Shape:
    """Width, inner width, layers and heads of the language model and of the tower; pixels of an image's side."""

    name: str
    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int]
    pixels: int


LARGE = Shape("llava-7b", (4096, 11008, 32, 32), (1024, 4096, 24, 16), 336)
TINY = Shape("llava-tiny", (64, 128, 2, 4), (32, 64, 2, 2), 56)
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
PATCH, DIM, PACK = 14, 768, 1024


def build_model_folder(shape: Shape, words: Path) -> Path:
    """A model folder of this shape, of random weights; its tokenizer and prompts are those of the folder `words`."""
    folder = _bench.WORK / shape.name
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(words)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **dict(zip(NAMES, shape.vision, strict=True)), image_size=shape.pixels, patch_size=PATCH
        ),
        text_config=LlamaConfig(
            **dict(zip(NAMES, shape.text, strict=True)), vocab_size=len(tokenizer)
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(shape.pixels // PATCH) ** 2,
    )
    config.dtype = torch.bfloat16
    with torch.device(select_device()):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    side = {"height": shape.pixels, "width": shape.pixels}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    with tempfile.TemporaryDirectory(dir=_bench.WORK) as base:
        model.save_pretrained(base)
        processor.save_pretrained(base)
        del model
        backbone = load_backbone(Path(base), device=select_device(), dtype=torch.bfloat16)
        DuetModel(backbone, prompts=PROMPTS, head="linear", dim=DIM).save_merged(folder)
    return folder


# ------------------------------------------------------------------ the share of the device


def count_useful_operations(folder: Path, records: list[Record]) -> float:
    """Operations of a step in which every token is read once, by a trunk whose own weights are frozen.

    A product with a weight takes two operations a token forward and two backward (towards the input; LoRA's own are left
    out), attention 2 x 2 x T x D a token and layer (causal: half of it) forward and twice that backward. The tower's
    features are cached, and logits are made of supervised tokens.
    """
    model = DuetModel.from_pretrained(folder, check_golden=False)
    samples = [Sample(record, position, 0) for position, record in enumerate(records)]
    sequences = [
        s for sample in samples for s in vladva.layout(sample, model.renderer, vladva.VladvaOptions())
    ]
    trunk = model.backbone.language_model
    weights = sum(p.numel() for p in trunk.layers.parameters() if p.ndim == 2)
    tokens = sum(len(s) for s in sequences)
    labels = sum(label != IGNORE_INDEX for s in sequences for label in s.labels)
    attention = sum(len(s) ** 2 for s in sequences) * model.backbone.hidden_size * len(trunk.layers)
    return (
        4.0 * weights * tokens + 4.0 * model.lm_head_weight.numel() * labels + 3.0 * 2.0 * attention
    )


def measure_matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices: the best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    found = []
    for _ in range(11):
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(2.0 * side**3 / (time.perf_counter() - began))
    return max(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two layers, on whatever there is")
    parser.add_argument(
        "--data",
        type=Path,
        help="pair records (default: the corpus stamps, fetched into runs/bench)",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    install_log_handler()
    device = select_device()
    if device.type != "cuda" and not options.tiny:
        print("not measured: there is no GPU; --tiny runs anywhere")
        return
    shape = TINY if options.tiny else LARGE
    folder = build_model_folder(shape, _bench.model_folder(None))
    _bench.machine()
    _bench.versions()
    records = train_step.select_records(_bench.pairs(options.data), options.records, options.seed)
    useful = count_useful_operations(folder, records)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = [f"vlduet, packed {PACK}", train_step.ONE_PASS_PER_LOSS, train_step.TRANSFORMERS]
    title = f"{shape.name}: a step on {len(records)} records, seed {options.seed}, layers computed twice"
    seconds = train_step.compare_contenders(
        title, names, folder, records, options.repeats, again=True
    )
    most = measure_matmul_speed(device, dtype)
    print(
        f"\n{useful / 1e12:.2f} Tflop a step; a product in {dtype} reaches {most / 1e12:.1f} Tflop/s"
    )
    for name, times in seconds.items():
        print(f"  {name:32} MFU {useful / statistics.median(times) / most:.1%}")
    if device.type == "cuda":
        print(f"peak memory of all together: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
