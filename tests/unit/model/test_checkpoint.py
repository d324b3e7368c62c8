"""A model folder: what is saved comes back bit for bit, anyone can read it, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from helpers import tiny
from vlduet.errors import ConfigError, ModelError
from vlduet.model.adapters import LoraSettings
from vlduet.model.backbone import fingerprint_checkpoint, load_backbone
from vlduet.model.duet import DuetModel

ITEMS = [
    "a",
    "a red apple on a table",
    tiny.random_image(1),
    (tiny.random_image(2), "what is this?"),
]


@pytest.fixture
def trained(family: str, tmp_path: Path) -> DuetModel:
    """A model of which every trainable tensor has moved away from its start."""
    model = tiny.build_duet_model(tmp_path / "base", family=family)
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def saved(trained: DuetModel, tmp_path: Path) -> Path:
    trained.save_pretrained(tmp_path / "model", provenance={"made_by": "a test"})
    return tmp_path / "model"


def rewrite(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------- what comes back


def test_save_and_load_are_bit_identical(trained: DuetModel, saved: Path) -> None:
    loaded = DuetModel.from_pretrained(saved)
    for ours, theirs in [
        (trained.own_tensors(), loaded.own_tensors()),
        (trained.adapter_tensors(), loaded.adapter_tensors()),
    ]:
        assert ours.keys() == theirs.keys() and ours
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
    assert np.array_equal(trained.encode(ITEMS), loaded.encode(ITEMS))
    assert loaded.fingerprint == trained.fingerprint and loaded.prompts == trained.prompts
    nll = [m.compute_caption_nll([(tiny.random_image(1), "a caption")]) for m in (trained, loaded)]
    assert nll[0] == nll[1]
    assert not loaded.training


def test_saving_twice_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    DuetModel.from_pretrained(saved).save_pretrained(again, provenance={"made_by": "a test"})
    assert files(again) == files(saved)


def test_the_manifest_lists_every_trained_tensor(trained: DuetModel, saved: Path) -> None:
    manifest = json.loads((saved / "vlduet.json").read_text())
    moved = [p for p in trained.parameters() if p.requires_grad]
    assert len(manifest["trained"]) == len({id(p) for p in moved})
    of_projector = {
        f"projector.{name}" for name, _ in trained.backbone.projector.named_parameters()
    }
    assert {"logit_scale", *of_projector} <= manifest["trained"].keys()
    assert any("lora_B" in name for name in manifest["trained"]) and any(
        n.startswith("head") for n in manifest["trained"]
    )
    assert sum(int(np.prod(f["shape"])) for f in manifest["trained"].values()) == sum(
        p.numel() for p in moved
    )
    assert manifest["provenance"] == {"made_by": "a test"} and manifest["base"] == "../base"


def test_a_folder_can_move_with_its_base(trained: DuetModel, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "model"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    loaded = DuetModel.from_pretrained(tmp_path / "elsewhere" / "model")
    assert np.array_equal(trained.encode(ITEMS), loaded.encode(ITEMS))


def test_a_saved_adapter_is_trained_further(trained: DuetModel, saved: Path) -> None:
    loaded = DuetModel.from_pretrained(saved)
    loaded.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=False)
    assert all(p.requires_grad for p in loaded.adapter_tensors().values())
    assert all(
        torch.equal(p, trained.adapter_tensors()[name])
        for name, p in loaded.adapter_tensors().items()
    )
    for other, place in [
        (LoraSettings(rank=3, alpha=4), "rank"),
        (LoraSettings(rank=2, alpha=4, targets="qv"), "targets"),
    ]:
        with pytest.raises(ConfigError, match=rf"train\.lora\.{place}.*merge"):
            loaded.make_trainable(lora=other, projector=False)


def test_an_adapter_that_was_made_when_fewer_layers_were_known_is_the_same_where_it_stands_on_the_same(
    trained: DuetModel, saved: Path
) -> None:
    loaded = DuetModel.from_pretrained(saved)
    config = loaded.peft_model.peft_config["default"]
    config.target_modules = config.target_modules.replace("|gate_up_proj", "")
    loaded.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=False)


def test_gate_and_up_in_one_have_lora_too(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base", family="glm4v")
    model.make_trainable(lora=LoraSettings(rank=2), projector=False)
    names = {name.split(".lora_")[0] for name in model.adapter_tensors()}
    assert {name.split(".")[-1] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"
    }  # fmt: skip
    assert len(names) == 2 * 6 and not any("visual" in name for name in names)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.1)
    before = model.encode([tiny.random_image(1), "a red apple"])
    model.save_pretrained(tmp_path / "model")
    assert_close(
        DuetModel.from_pretrained(tmp_path / "model").encode([tiny.random_image(1), "a red apple"]),
        before,
    )
    model.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged").encode(
        [tiny.random_image(1), "a red apple"]
    )
    assert_close(merged, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_new_lora_layers_are_in_the_mode_of_their_model(tmp_path: Path, training: bool) -> None:
    """A dropout that is on in evaluation would make two embeddings of one text."""
    model = tiny.build_duet_model(tmp_path / "base").train(training)
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4, dropout=0.5), projector=False)
    dropouts = [m for name, m in model.named_modules() if "lora_dropout.default" in name]
    assert dropouts and all(m.training is training for m in dropouts)


# ---------------------------------------------------------------------- what others read


def test_merged_equals_unmerged(trained: DuetModel, tmp_path: Path) -> None:
    before = trained.encode(ITEMS)
    trained.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert merged.peft_model is None and not merged.adapter_tensors()
    assert_close(merged.encode(ITEMS), before, atol=1e-5, rtol=0)
    (tmp_path / "base").rename(tmp_path / "gone")  # self-contained: the base is no longer needed
    assert_close(
        DuetModel.from_pretrained(tmp_path / "merged").encode(ITEMS), before, atol=1e-5, rtol=0
    )


def test_the_model_that_was_merged_is_the_merged_one(trained: DuetModel, tmp_path: Path) -> None:
    trained.save_merged(tmp_path / "merged")
    assert trained.fingerprint == DuetModel.from_pretrained(tmp_path / "merged").fingerprint
    trained.save_pretrained(
        tmp_path / "beside"
    )  # refers to the merged weights, not to the former base
    assert np.array_equal(
        DuetModel.from_pretrained(tmp_path / "beside").encode(ITEMS), trained.encode(ITEMS)
    )


def test_weights_that_differ_in_one_tensor_have_another_name(tmp_path: Path) -> None:
    """Merged adapters change some tensors in the middle of a file of gigabytes."""
    folder = tiny.build_llava(tmp_path)
    path = next(folder.glob("model*.safetensors"))
    weights = load_file(path)
    before = fingerprint_checkpoint(folder)
    for name in weights:
        save_file({**weights, name: weights[name] * 1.5 + 0.25}, path, metadata={"format": "pt"})
        assert fingerprint_checkpoint(folder) != before, name
    save_file(weights, path, metadata={"format": "pt"})
    assert fingerprint_checkpoint(folder) == before


@pytest.mark.parametrize(
    "junk", [b"", b"PK\x03\x04 a pickle", b"\x02" + bytes(7) + b"[]", b"\xff" * 64]
)
def test_a_name_of_weights_that_are_none_is_an_error(tmp_path: Path, junk: bytes) -> None:
    folder = tiny.build_llava(tmp_path)
    path = next(folder.glob("model*.safetensors"))
    path.write_bytes(junk)
    with pytest.raises(ModelError, match=r"not a safetensors file"):
        fingerprint_checkpoint(folder)


def test_plain_peft_gives_the_same_hidden_states(
    trained: DuetModel, saved: Path, tmp_path: Path
) -> None:
    batch = trained.collate([trained.renderer.render_embedding(("a red apple",))])
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, str(saved / "adapter")).eval()
    with torch.no_grad():
        theirs = plain.base_model.model.model(input_ids=batch.token_ids).last_hidden_state
        assert_close(trained.hidden_states(batch), theirs, atol=1e-5, rtol=1e-5)
        trained.peft_model.disable_adapter_layers()
        assert (trained.hidden_states(batch) - theirs).abs().max() > 1e-3, "the adapter must matter"
    assert str(tmp_path) not in (saved / "adapter" / "adapter_config.json").read_text()


def test_plain_transformers_opens_a_merged_folder(trained: DuetModel, tmp_path: Path) -> None:
    sequence = trained.renderer.render_caption(tiny.random_image(1), "a red apple")
    trained.save_merged(tmp_path / "merged")
    batch = trained.collate([sequence])
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        theirs = plain.model(
            **tiny.transformers_inputs(trained, batch.token_ids, batch.images)
        ).last_hidden_state
        assert_close(trained.hidden_states(batch), theirs, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- what is refused


def test_a_changed_base_is_refused(saved: Path, tmp_path: Path) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="another one now"):
        DuetModel.from_pretrained(saved)


def test_a_base_that_is_gone_is_named(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(ModelError, match="is gone"):
        DuetModel.from_pretrained(saved)


@pytest.mark.parametrize("what", ["head.layers.0.weight", "logit_scale"])
def test_a_changed_tensor_is_refused(saved: Path, what: str) -> None:
    tensors = load_file(saved / "duet.safetensors")
    save_file(tensors | {what: tensors[what] + 1e-6}, saved / "duet.safetensors")
    with pytest.raises(ModelError, match=f"'{what}' is not what was saved"):
        DuetModel.from_pretrained(saved)


def test_a_changed_adapter_is_refused(saved: Path) -> None:
    path = saved / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * 1.001}, path)
    with pytest.raises(ModelError, match=r"lora_.*is not what was saved"):
        DuetModel.from_pretrained(saved)


def test_a_missing_tensor_is_named(saved: Path) -> None:
    tensors = load_file(saved / "duet.safetensors")
    lost = next(name for name in tensors if name.startswith("projector."))
    tensors.pop(lost)
    save_file(tensors, saved / "duet.safetensors")
    with pytest.raises(ModelError, match=rf"'{lost}' is missing"):
        DuetModel.from_pretrained(saved)


def test_a_missing_adapter_is_named(saved: Path) -> None:
    (saved / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        DuetModel.from_pretrained(saved)


def test_embeddings_that_differ_from_those_at_saving_are_refused(saved: Path) -> None:
    golden = load_file(saved / "golden.safetensors")["vectors"]
    save_file({"vectors": golden.roll(1, dims=1).contiguous()}, saved / "golden.safetensors")
    with pytest.raises(ModelError, match="embeddings differ"):
        DuetModel.from_pretrained(saved)
    DuetModel.from_pretrained(saved, check_golden=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"image_backend": "torchvision"}, "torchvision"),
        ({"head": None}, "head"),
    ],
)
def test_another_manifest_is_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    rewrite(saved / "vlduet.json", **changes)
    with pytest.raises(ModelError, match=message):
        DuetModel.from_pretrained(saved)


@pytest.mark.parametrize("name", ["vlduet.json", "duet.safetensors", "golden.safetensors"])
def test_half_a_file_is_refused(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError):
        DuetModel.from_pretrained(saved)


def test_an_adapter_of_another_base_is_refused(
    trained: DuetModel, saved: Path, tmp_path: Path
) -> None:
    config = saved / "adapter" / "adapter_config.json"
    rewrite(config, target_modules=".*no_such_layer")
    with pytest.raises(ModelError, match="adapter"):
        DuetModel.from_pretrained(saved)


def test_nothing_here(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither vlduet\.json nor config\.json"):
        DuetModel.from_pretrained(tmp_path)


def test_a_checkpoint_that_brings_code_is_refused(tmp_path: Path) -> None:
    tiny.build_fast_vlm(tmp_path / "base")
    rewrite(tmp_path / "base" / "config.json", auto_map={"AutoModel": "modeling_x.X"})
    (tmp_path / "base" / "modeling_x.py").write_text(
        "raise SystemExit('the checkpoint ran its code')"
    )
    with pytest.raises(ModelError, match="auto_map"):
        DuetModel.from_pretrained(tmp_path / "base")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    tiny.build_fast_vlm(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "base" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        DuetModel.from_pretrained(tmp_path / "base")
    save_file(
        {"x": torch.zeros(1)}, tmp_path / "base" / "duet.safetensors"
    )  # some other safetensors changes nothing
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        DuetModel.from_pretrained(tmp_path / "base")


def test_an_unknown_model_type_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    tiny.build_fast_vlm(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    rewrite(config, model_type="blip-2")
    known = "fast_vlm, gemma3, gemma4, glm46v, glm4v, idefics3, internvl, llava, llava_next, llava_onevision, mistral3"
    with pytest.raises(ModelError, match=rf"model_type 'blip-2'.*Known: {known}"):
        DuetModel.from_pretrained(tmp_path / "base")
    rewrite(config, model_type="lava")
    with pytest.raises(ModelError, match="Did you mean 'llava'"):
        DuetModel.from_pretrained(tmp_path / "base")


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    tiny.build_fast_vlm(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "q_proj" in name)
    tensors.pop(lost)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing.*q_proj"):
        DuetModel.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"]
)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path, name: str) -> None:
    tiny.build_fast_vlm(tmp_path / "base")
    path = tmp_path / "base" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="base"):
        load_backbone(tmp_path / "base")


# ---------------------------------------------------------------------- written whole or not at all


def test_saving_over_the_base_is_refused(trained: DuetModel, tmp_path: Path) -> None:
    """The folder would hold a reference to itself, and the weights would be gone."""
    before = files(tmp_path / "base")
    with pytest.raises(ModelError, match="base"):
        trained.save_pretrained(tmp_path / "base")
    assert files(tmp_path / "base") == before


def test_a_merged_folder_can_be_written_over_its_base(trained: DuetModel, tmp_path: Path) -> None:
    before = trained.encode(ITEMS)
    trained.save_merged(tmp_path / "base")
    assert_close(
        DuetModel.from_pretrained(tmp_path / "base").encode(ITEMS), before, atol=1e-5, rtol=0
    )


def test_a_model_is_found_after_a_kill_between_the_two_renames(
    trained: DuetModel, saved: Path
) -> None:
    saved.rename(saved.with_name(".model.old"))
    assert np.array_equal(DuetModel.from_pretrained(saved).encode(ITEMS), trained.encode(ITEMS))
