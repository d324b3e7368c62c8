"""Folders and files that are named as a checkpoint and are none that can be loaded.

Each is recognised by its files, and gets one line that says what it is and what to do. Nothing is
loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlduet.errors import ModelError, quote_value
from vlduet.hub import describe_missing_path
from vlduet.library_errors import COPY_AGAIN
from vlduet.model.config_limits import check_config_numbers
from vlduet.structured_files import FieldTypes, list_indexed_weights, read_json_object

PICKLED_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Weights that run code when they are read."""
OTHER_WEIGHTS = {"*.gguf": "GGUF", "*.h5": "TensorFlow", "*.msgpack": "Flax", "*.onnx": "ONNX"}
"""Weights of other libraries by the pattern of their files."""
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of a config.json that only quantised checkpoints have; the last is MLX's."""
QUANTISATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of early quantised checkpoints, whose config.json says nothing, by name."""
LFS_POINTER_START = b"version https://git-lfs"
"""Begin of a file that Git LFS leaves in place of a large one."""
MAX_POINTER_BYTES = 1024
"""Largest size of a pointer of Git LFS."""
CONVERTED = (
    "Use the version of the checkpoint for transformers, often under a name that ends in -hf"
)
EMBEDS_ONLY = "It embeds and cannot generate: name it under encoders (docs/train.md)"
TYPE_REMEDIES = {
    **dict.fromkeys(("clip", "siglip", "siglip2", "dinov2", "bert", "xlm-roberta"), EMBEDS_ONLY),
    "internvl_chat": CONVERTED,
    "llava_llama": CONVERTED,
    "llava_mistral": CONVERTED,
    "llava_qwen": CONVERTED,
    "llava_qwen2": CONVERTED,
}
"""Remedy by `model_type` of encoders, and of what other libraries write for supported families."""


def describe_folder_without_config(folder: Path) -> ModelError:
    """Return, not raise, the error of a path that has no config.json: what it is, and what to do.

    The path may be missing, a file, or a folder of any kind.
    """
    if not folder.exists():
        return describe_missing_path(folder)
    if folder.is_file():
        return _describe_file(folder)
    message, fix = _recognise_folder(folder)
    return ModelError(message, place=folder, fix=fix)


def _describe_file(path: Path) -> ModelError:
    """Return the error of a file that is named as a model."""
    library = OTHER_WEIGHTS.get(f"*{path.suffix.lower()}")
    if library is None:
        return ModelError("a file, not a model folder", place=path, fix="Name the folder it is in")
    fix = "Use the folder of the original checkpoint, in safetensors format"
    return ModelError(f"weights in {library} format, which are not read", place=path, fix=fix)


def _recognise_folder(folder: Path) -> tuple[str, str]:
    """Return what an existing folder without config.json holds, and what to do."""
    snapshots = _list_snapshots(folder)
    if snapshots:
        latest = snapshots[-1]
        more = f" (the newest of {len(snapshots)})" if len(snapshots) > 1 else ""
        return "a cache of the hub, whose models are in snapshots", f"Name {latest}{more}"
    if (folder / "adapter_config.json").is_file():
        return _describe_adapter(folder)
    if (folder / "dual.json").is_file():
        return (
            "a dual encoder, which embeds and cannot generate",
            "Name it where only embeddings count",
        )
    if (folder / "params.json").is_file():
        return "the original layout of the authors (params.json)", CONVERTED
    weights = _describe_other_weights(folder)
    if weights is not None:
        return f"no config.json, and {weights}", "Use the whole folder of a safetensors checkpoint"
    models = [
        path.parent for name in ("vlduet.json", "config.json") for path in folder.glob(f"*/{name}")
    ]
    if models:
        return "no model itself, but there is one below", f"Name {sorted(models)[0]}"
    fix = "Name a model folder or a checkpoint of transformers"
    if not any(folder.iterdir()):
        return "neither vlduet.json nor config.json here: the folder is empty", fix
    return "neither vlduet.json nor config.json here", fix


def _list_snapshots(folder: Path) -> list[Path]:
    """Return the snapshots below a folder of a hub's cache, the latest last; [] for others."""
    parent = folder if folder.name == "snapshots" else folder / "snapshots"
    if not parent.is_dir():
        return []
    snapshots = [path for path in parent.iterdir() if path.is_dir()]
    return sorted(snapshots, key=lambda path: path.stat().st_mtime)


def _describe_adapter(folder: Path) -> tuple[str, str]:
    """Return what a folder with adapter_config.json is, with the name of its base, and a remedy."""
    key = "base_model_name_or_path"
    try:
        config = read_json_object(
            folder / "adapter_config.json", {key: str}, error_class=ModelError, fix=COPY_AGAIN
        )
        base = config[key][:80]
    except ModelError:
        base = "an unknown model"
    return (
        f"an adapter of PEFT for '{base}', without that model's weights",
        f"Merge it into '{base}' with PEFT and name the result, or name '{base}' itself",
    )


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Return the content of an adapter_config.json of PEFT.

    Raises:
        ModelError: it is missing or broken, or not that of a LoRA adapter.
    """
    fields: FieldTypes = {"peft_type": str, "r": int, "lora_alpha": (int, float)}
    optional: FieldTypes = {"rank_pattern": (dict, type(None))}
    config = read_json_object(
        path, fields, error_class=ModelError, fix=COPY_AGAIN, optional=optional
    )
    if config["peft_type"] != "LORA" or config["r"] < 1:
        message = f"peft_type is {quote_value(config['peft_type'])}, r is {config['r']}"
        raise ModelError(message, place=path, fix="Name a LoRA adapter")
    return config


def _describe_other_weights(folder: Path) -> str | None:
    """Return which weights a folder has that are not read, or None without any."""
    for pattern, library in OTHER_WEIGHTS.items():
        if any(folder.glob(pattern)):
            return f"weights in {library} format, which are not read"
    names = sorted(path.name for pattern in PICKLED_PATTERNS for path in folder.glob(pattern))
    return f"pickled weights ({names[0]}), which are never read" if names else None


def check_checkpoint(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that a folder with a config.json has weights that can be read, by its files alone.

    Args:
        folder: folder of a checkpoint.
        config: content of its config.json.

    Raises:
        ModelError: it is quantised; files are pointers of Git LFS; there are no files
            ``model*.safetensors``, or one that the index names is missing; a config has a size that
            the weights or images cannot have.
    """
    method = _find_quantisation(folder, config)
    if method is not None:
        message = f"a quantised checkpoint ({method}), which is not supported"
        raise ModelError(message, place=folder, fix="Use the original, unquantised checkpoint")
    pointers = [path for path in sorted(folder.glob("*")) if _is_lfs_pointer(path)]
    if pointers:
        message = f"{pointers[0].name} is a pointer of Git LFS, not the file itself"
        fix = "Run 'git lfs pull' in the folder, or download it again"
        raise ModelError(message, place=folder, fix=fix)
    if not any(folder.glob("model*.safetensors")):
        raise _describe_missing_weights(folder)
    missing = _list_missing_shards(folder)
    if missing:
        message = f"{len(missing)} files of the weights are missing, such as {missing[0]}"
        raise ModelError(message, place=folder, fix="Copy or download the whole folder again")
    check_config_numbers(folder, config)


def _find_quantisation(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return how a checkpoint is quantised, such as ``awq, 4 bits``, or None if it is not."""
    for section in (config, config.get("text_config"), config.get("llm_config")):
        if not isinstance(section, Mapping):
            continue
        for key in QUANTISATION_KEYS:
            settings = section.get(key)
            if not settings:
                continue
            if not isinstance(settings, Mapping):
                return key
            method = settings.get("quant_method") or settings.get("format") or key
            bits = settings.get("bits") or settings.get("w_bit")
            if settings.get("load_in_4bit"):
                bits = 4
            elif settings.get("load_in_8bit"):
                bits = 8
            return f"{method}, {bits} bits"[:80] if bits else str(method)[:80]
    methods = [name for file, name in QUANTISATION_FILES.items() if (folder / file).is_file()]
    return methods[0] if methods else None


def _is_lfs_pointer(path: Path) -> bool:
    """Return whether a path is a small file that begins as a pointer of Git LFS."""
    if not path.is_file() or path.stat().st_size > MAX_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER_START)) == LFS_POINTER_START


def _describe_missing_weights(folder: Path) -> ModelError:
    """Return the error of a folder with config.json, but without ``model*.safetensors``."""
    if (folder / "adapter_config.json").is_file():
        message, fix = _describe_adapter(folder)
        return ModelError(message, place=folder, fix=fix)
    reason = _describe_other_weights(folder)
    fix = "Convert the checkpoint: pickled weights are never read"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if reason is None and others:
        reason, fix = f"{others[0]} instead of model.safetensors", CONVERTED
    elif reason is None:
        reason, fix = (
            "the download or copy is incomplete",
            "Copy or download the whole folder again",
        )
    return ModelError(f"no .safetensors weights: {reason}", place=folder, fix=fix)


def _list_missing_shards(folder: Path) -> list[str]:
    """Return the files that the index of the weights names and the folder lacks; [] without one.

    A broken index gives [], too: the loader says what is wrong with it.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return []
    files = list_indexed_weights(index) or ()
    return sorted(name for name in files if not (folder / name).is_file())


def describe_unknown_type(
    model_type: str, folder: Path, *, supported: Collection[str]
) -> ModelError:
    """Return, not raise, the error of a `model_type` that is not in `supported`, with a remedy."""
    spellings = {_normalize_type(name): name for name in supported}
    spelling = spellings.get(_normalize_type(model_type))
    fix = f"Use a checkpoint of one of these: {', '.join(sorted(supported))}"
    if spelling is not None:
        fix = f"Did you mean '{spelling}'?"
    message = f"model_type '{model_type[:80]}' is not supported"
    fix = TYPE_REMEDIES.get(model_type, fix)
    return ModelError(message, place=folder / "config.json", fix=fix)


def _normalize_type(model_type: str) -> str:
    """Return the letters and digits of a `model_type`, in lower case."""
    return "".join(character for character in model_type.lower() if character.isalnum())
