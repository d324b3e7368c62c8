"""What of sentence-transformers our settings cannot represent is refused by name, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import tiny
from helpers.tiny_published import (
    IDENTITY,
    MESSAGE,
    MODALITIES,
    build_published,
    remove_lm_head,
    write_json,
)
from vlduet.errors import ModelError
from vlduet.model.duet import DuetModel
from vlduet.model.sentence_transformers_format import read_published_model


def change_json(path: str, **values: object) -> Callable[[Path], None]:
    """Return a function that sets keys of a JSON file in a folder."""

    def change(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        write_json(folder / path, content | values)

    return change


def change_module(number: int, **values: object) -> Callable[[Path], None]:
    """Return a function that sets keys of a module in modules.json."""

    def change(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        modules[number] |= values
        write_json(folder / "modules.json", modules)

    return change


BERT = "sentence_bert_config.json"
DENSE = "2_Dense/config.json"
REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "maximum": (change_json("1_Pooling/config.json", pooling_mode="max"), "pooling max"),
    "two modes": (
        change_json("1_Pooling/config.json", pooling_mode=["mean", "lasttoken"]),
        "pooling mean and lasttoken",
    ),
    "Tanh": (
        change_json(DENSE, activation_function="torch.nn.modules.activation.Tanh"),
        "a Dense layer with 'Tanh'",
    ),
    "residual": (change_json(DENSE, use_residual=True), "use_residual"),
    "code": (change_module(0, type="custom_st.Transformer"), "'custom_st.Transformer' is code"),
    "LSTM": (change_module(1, type="sentence_transformers.models.LSTM"), "module 'LSTM'"),
    "no pooling": (
        change_module(1, type="sentence_transformers.models.Normalize"),
        "a model of Transformer, Normalize",
    ),
    "outside": (change_module(2, path="../other"), "outside of the folder"),
    "no text": (change_module(2, path=3), "'path' is 3, not a text"),
    "hidden states": (
        change_json(
            BERT,
            modality_config=MODALITIES
            | {"message": MESSAGE | {"method_output_name": ["hidden_states", -2]}},
        ),
        "modality_config.message",
    ),
    "logits": (change_json(BERT, transformer_task="text-generation"), "transformer_task"),
    "template argument": (
        change_json(BERT, processing_kwargs={"chat_template": {"tools": [1]}}),
        "chat_template.tools",
    ),
    "template file": (
        change_json(BERT, processing_kwargs={"chat_template": {"chat_template": "other"}}),
        "chat template is missing",
    ),
    "tokenizer argument": (
        change_json(BERT, processing_kwargs={"text": {"add_special_tokens": False}}),
        "text.add_special_tokens",
    ),
    "image argument": (change_json(BERT, processor_kwargs={"num_crops": 4}), "'num_crops'"),
    "type of an image argument": (change_json(BERT, processor_kwargs={"size": 5}), "'size'"),
    "method of the image processor": (
        change_json(BERT, processor_kwargs={"preprocess": "x"}),
        "'preprocess'",
    ),
    "number of pixels": (
        change_json(BERT, processor_kwargs={"max_pixels": "many"}),
        "'processor_kwargs.max_pixels' is 'many'",
    ),
    "list of arguments": (change_json(BERT, tokenizer_args=[1]), "'tokenizer_args'"),
    "lower case": (change_json(BERT, do_lower_case=True), "do_lower_case"),
    "config": (change_json(BERT, config_kwargs={"is_causal": False}), "config_kwargs"),
    "both directions": (change_json("config.json", is_causal=False), "both directions"),
    "broken": (lambda folder: (folder / DENSE).write_text("{"), "broken JSON"),
    "wrong type": (change_json(BERT, max_seq_length="long"), "'max_seq_length' is 'long'"),
    "default prompt": (
        change_json("config_sentence_transformers.json", default_prompt_name="z"),
        "default_prompt_name",
    ),
    "missing weights": (
        lambda folder: (folder / "2_Dense/model.safetensors").unlink(),
        "pickled weights are never read",
    ),
    "broken weights": (
        lambda folder: (folder / "2_Dense/model.safetensors").write_bytes(b"x" * 40),
        "2_Dense",
    ),
}


CORRUPTIONS = [b"", b"{", b"\x00" * 9, b"[[1]]", b'"x"', b"[" * 900, b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model with a Dense layer, which tests copy."""
    return build_published(tmp_path_factory.mktemp("published") / "m", dense=((12, IDENTITY),))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_represented_is_refused_by_name(
    published_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "model"
    for path in published_folder.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(published_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    change, message = REFUSALS[name]
    change(folder)
    with pytest.raises(ModelError) as error_info:
        DuetModel.from_pretrained(folder, device="cpu")
    text = str(error_info.value)
    assert message in text and str(folder) in text and "\n" not in text


@pytest.mark.parametrize(
    "name",
    [
        "modules.json",
        "config_sentence_transformers.json",
        BERT,
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    ],
)
def test_a_broken_file_is_named(published_folder: Path, name: str) -> None:
    path = published_folder / name
    content = path.read_bytes()
    try:
        for corruption in CORRUPTIONS:
            path.write_bytes(corruption)
            with pytest.raises(ModelError) as error_info:
                read_published_model(published_folder)
            assert str(path) in str(error_info.value) and "\n" not in str(error_info.value)
        path.unlink()
        path.mkdir()
        with pytest.raises(ModelError):
            read_published_model(published_folder)
        path.rmdir()
    finally:
        path.write_bytes(content)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model", dense=((12, IDENTITY),))
    other = build_published(tmp_path / "other", dense=((7, IDENTITY), (12, IDENTITY)))
    weights = "2_Dense/model.safetensors"
    (folder / weights).write_bytes((other / "3_Dense/model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="Dense layers"):
        DuetModel.from_pretrained(folder, device="cpu")


def test_a_text_encoder_says_what_it_is(tmp_path: Path) -> None:
    tiny.build_text_encoder(tmp_path)
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    modules.append({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"})
    write_json(tmp_path / "modules.json", modules)
    with pytest.raises(ModelError, match=r"text encoder .*\(bert\).*encoders\.text"):
        DuetModel.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("siglip", "name it under encoders"), ("qwen9_vl", "'qwen9_vl' is not supported")],
)
def test_another_architecture_says_what_to_do(
    tmp_path: Path, model_type: str, message: str
) -> None:
    write_json(tmp_path / "config.json", {"model_type": model_type, "vision_config": {}})
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    write_json(tmp_path / "modules.json", modules)
    with pytest.raises(ModelError, match=message):
        DuetModel.from_pretrained(tmp_path, device="cpu")


def test_a_dot_product_without_normalisation_is_refused(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", modules[:-1])
    assert read_published_model(folder) is not None
    change_json("config_sentence_transformers.json", similarity_fn_name="dot")(folder)
    with pytest.raises(ModelError, match="'dot' without Normalize"):
        read_published_model(folder)


def test_other_missing_tensors_are_an_error(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model")
    remove_lm_head(folder)
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    assert DuetModel.from_pretrained(folder, device="cpu").encode(["x"]).shape == (1, 32)


def test_other_folders_are_no_published_models(tmp_path: Path) -> None:
    assert read_published_model(tmp_path) is None
    assert read_published_model(tiny.build_llava(tmp_path / "llava")) is None
