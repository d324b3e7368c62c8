"""A joint step of a model as large as LLaVA-1.5-7B, of random weights, in bfloat16.

The contenders are those of `train_step.py`, row a, with gradient checkpointing:

    vlduet, packed 1024           one forward pass, both losses read from it; vision features cached
    vlduet, a pass for each loss  train.fused=false
    transformers + peft           three padded passes, full logits

MFU (model FLOPs utilisation) is the share of the device's speed that a step makes use of: the
operations that the two losses need, each token once, divided by the time of a step and by the speed
of a product of two matrices in the same precision, measured in the same run. Recomputed layers,
padding and a second pass over an image are no use.

    python benchmarks/large.py [--tiny] [--data FILE]

It needs a GPU of 80 GB, and 30 GB of disk until the model is built. --tiny: two layers, on any
device.
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
from vlduet.logs import install_log_handler
from vlduet.model.backbone import load_backbone, select_device
from vlduet.model.duet import DuetModel
from vlduet.model.nano import PROMPTS


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    """Name of its folder."""
    text: tuple[int, int, int, int]
    """Sizes of the language model, in the order of SIZE_NAMES."""
    vision: tuple[int, int, int, int]
    """Sizes of the vision tower, in the order of SIZE_NAMES."""
    image_size: int
    """Width and height of an image in pixels."""


SIZE_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LARGE = Shape("llava-7b", (4096, 11008, 32, 32), (1024, 4096, 24, 16), 336)
TINY = Shape("llava-tiny", (64, 128, 2, 4), (32, 64, 2, 2), 56)
PATCH_SIZE = 14
EMBEDDING_DIM = 768
PACKED_ROW_LENGTH = 1024


def build_model_folder(shape: Shape, tokenizer_folder: Path) -> Path:
    """Write a model folder with random weights, unless it exists, and return it.

    Args:
        shape: sizes of the model.
        tokenizer_folder: folder of a checkpoint whose tokenizer it gets.
    """
    folder = _bench.WORK_FOLDER / shape.name
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    vision_sizes = dict(zip(SIZE_NAMES, shape.vision, strict=True))
    text_sizes = dict(zip(SIZE_NAMES, shape.text, strict=True))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **vision_sizes, image_size=shape.image_size, patch_size=PATCH_SIZE
        ),
        text_config=LlamaConfig(**text_sizes, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(shape.image_size // PATCH_SIZE) ** 2,
    )
    config.dtype = torch.bfloat16
    with torch.device(select_device()):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    size = {"height": shape.image_size, "width": shape.image_size}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    with tempfile.TemporaryDirectory(dir=_bench.WORK_FOLDER) as base:
        model.save_pretrained(base)
        processor.save_pretrained(base)
        del model
        backbone = load_backbone(Path(base), device=select_device(), dtype=torch.bfloat16)
        duet = DuetModel(backbone, prompts=PROMPTS, head="linear", dim=EMBEDDING_DIM)
        duet.save_merged(folder)
    return folder


# ------------------------------------------------------------------ utilisation


def count_useful_operations(folder: Path, records: list[Record]) -> float:
    """Return the operations of a step that reads every token once, with frozen weights.

    A product with a weight takes two operations for each token forward and two backward (towards
    its input; the LoRA matrices are left out). Attention takes 2 x 2 x T x D for each token and
    layer, half of it because it is causal, and twice that backward. Vision features are cached, and
    only labels have logits.
    """
    model = DuetModel.from_pretrained(folder, check_golden=False)
    sequences = train_step.layout_records(model, records)
    language_model = model.backbone.language_model
    num_layers = len(language_model.layers)
    weights = sum(p.numel() for p in language_model.layers.parameters() if p.ndim == 2)
    tokens = sum(len(sequence) for sequence in sequences)
    labels = sum(sequence.num_labels for sequence in sequences)
    squared_lengths = sum(len(sequence) ** 2 for sequence in sequences)
    attention = squared_lengths * model.backbone.hidden_size * num_layers
    head = model.lm_head_weight.numel()
    return 4.0 * weights * tokens + 4.0 * head * labels + 3.0 * 2.0 * attention


def measure_matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a product of two square matrices, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    speeds = []
    for _ in range(11):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        speeds.append(2.0 * size**3 / (time.perf_counter() - start))
    return max(speeds[1:])  # the first one warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two layers, on any device")
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
    folder = build_model_folder(shape, _bench.find_model_folder(None))
    _bench.print_machine()
    _bench.print_versions()
    pairs = _bench.load_pairs(options.data)
    records = train_step.select_records(pairs, options.records, options.seed)
    seconds = train_step.compare_contenders(
        f"{shape.name}: a step on {len(records)} records, seed {options.seed}, "
        "layers computed twice",
        [
            f"vlduet, packed {PACKED_ROW_LENGTH}",
            train_step.ONE_PASS_PER_LOSS,
            train_step.TRANSFORMERS,
        ],
        folder=folder,
        records=records,
        repeats=options.repeats,
        recompute_layers=True,
    )
    operations = count_useful_operations(folder, records)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    speed = measure_matmul_speed(device, dtype)
    print(f"\n{operations / 1e12:.2f} Tflop a step", end="; ")
    print(f"a product in {dtype} reaches {speed / 1e12:.1f} Tflop/s")
    for name, times in seconds.items():
        print(f"  {name:32} MFU {operations / statistics.median(times) / speed:.1%}")
    if device.type == "cuda":
        print(f"peak memory of all together: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
