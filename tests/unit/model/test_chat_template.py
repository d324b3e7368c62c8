"""A chat template is found wherever AutoProcessor finds it, and its date never changes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer, TokenizersBackend

from helpers import tiny
from helpers.tiny_tokenizers import CHAT_TEMPLATE
from vlduet.data.records import Message
from vlduet.errors import ConfigError, ModelError
from vlduet.model import chat_template
from vlduet.model.chat_template import FIXED_TIMES, fix_date
from vlduet.model.checkpoint import read_checkpoint
from vlduet.model.duet import DuetModel
from vlduet.model.processing import load_processor
from vlduet.model.prompts import Prompts, Renderer

OTHER_TEMPLATE = CHAT_TEMPLATE.replace("'</s>'", "'</s></s>'")
DATED_TEMPLATE = (
    "{%- set today = strftime_now('%d %B %Y') if strftime_now is defined else 'some day' -%}"
    "{%- macro greet() -%}It is {{ strftime_now('%A') }}, {{ today }}. {%- endmacro -%}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}"
    "{% endfor %}{{ greet() }}</s>{% endfor %}"
)
CHAT = (Message("user", ("hello",)),)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_llava(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture
def base(llava: Path, tmp_path: Path) -> Path:
    """A checkpoint without a chat template."""
    folder = tmp_path / "base"
    shutil.copytree(llava, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def update_json(path: Path, key: str, value: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | {key: value}))


def write_additional(folder: Path, name: str, template: str) -> None:
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template)


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def write_jinja(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(folder: Path) -> None:
    update_json(folder / "chat_template.json", "chat_template", CHAT_TEMPLATE)


def write_processor(folder: Path) -> None:
    update_json(folder / "processor_config.json", "chat_template", CHAT_TEMPLATE)


def write_tokenizer(folder: Path, template: Any = CHAT_TEMPLATE) -> None:
    update_json(folder / "tokenizer_config.json", "chat_template", template)


def write_all(folder: Path) -> None:
    """The processor's own config comes first."""
    write_processor(folder)
    (folder / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    write_tokenizer(folder, OTHER_TEMPLATE)


def write_json_and_tokenizer(folder: Path) -> None:
    """As LLaVA-OneVision, whose tokenizer is that of a language model."""
    write_json(folder)
    write_tokenizer(folder, OTHER_TEMPLATE)


def write_jinja_and_tokenizer(folder: Path) -> None:
    write_jinja(folder)
    write_tokenizer(folder, OTHER_TEMPLATE)


def write_jinja_and_others(folder: Path) -> None:
    write_jinja(folder)
    write_additional(folder, "tool_use", OTHER_TEMPLATE)


def write_named_default(folder: Path) -> None:
    write_additional(folder, "tool_use", OTHER_TEMPLATE)
    write_additional(folder, "default", CHAT_TEMPLATE)


PROCESSOR_PLACES: list[Callable[[Path], None]] = [
    write_jinja,
    write_json,
    write_processor,
    write_all,
    write_json_and_tokenizer,
    write_jinja_and_tokenizer,
    write_jinja_and_others,
    write_named_default,
]


@pytest.mark.parametrize("write", PROCESSOR_PLACES)
def test_the_template_is_that_of_the_processor(base: Path, write: Callable[[Path], None]) -> None:
    write(base)
    template = AutoProcessor.from_pretrained(base).chat_template
    if isinstance(template, dict):
        template = template["default"]
    assert template == CHAT_TEMPLATE
    assert load_processor(base).tokenizer.chat_template == template


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, named(tool_use=OTHER_TEMPLATE, default=CHAT_TEMPLATE)]
)
def test_the_template_of_the_tokenizer_is_used_without_one_of_the_processor(
    base: Path, template: Any
) -> None:
    write_tokenizer(base, template)
    assert load_processor(base).tokenizer.chat_template == CHAT_TEMPLATE


def test_a_missing_template_is_looked_for_by_name(base: Path) -> None:
    write_tokenizer(base, named(tool_use=OTHER_TEMPLATE))
    renderer = Renderer(load_processor(base), prompts=Prompts())
    files = ("chat_template.jinja", "chat_template.json", "processor_config", "tokenizer_config")
    with pytest.raises(ConfigError) as caught:
        renderer.render_chat(CHAT, add_generation_prompt=True)
    assert all(name in str(caught.value) for name in files)


def test_an_export_has_the_template_in_use_alone(base: Path, tmp_path: Path) -> None:
    write_all(base)
    DuetModel.from_pretrained(base).save_merged(tmp_path / "merged")
    for reader in (AutoTokenizer, AutoProcessor):
        assert reader.from_pretrained(tmp_path / "merged").chat_template == CHAT_TEMPLATE
    assert load_processor(tmp_path / "merged").tokenizer.chat_template == CHAT_TEMPLATE


def test_a_model_of_an_early_version_keeps_the_template_of_its_tokenizer(
    base: Path, tmp_path: Path
) -> None:
    """The one of the processor, which early versions did not find, would change its vectors."""
    write_json(base)
    write_tokenizer(base, OTHER_TEMPLATE)
    DuetModel.from_pretrained(base).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    manifest_path = tmp_path / "model" / "vlduet.json"
    manifest = json.loads(manifest_path.read_text())
    for key in ("files", "base_files", "manifest_sha256"):
        del manifest[key]
    manifest_path.write_text(json.dumps(manifest))
    assert read_checkpoint(tmp_path / "model").chat_template is None
    assert manifest["prompts"].pop("joined") is True
    manifest_path.write_text(json.dumps(manifest))
    model = DuetModel.from_pretrained(tmp_path / "model", check_golden=False)
    assert model.backbone.tokenizer.chat_template == OTHER_TEMPLATE
    assert not model.prompts.joined


def test_a_tokenizer_without_offsets_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenizersBackend, "is_fast", False)
    with pytest.raises(ModelError, match=r"Save the checkpoint with a tokenizer\.json"):
        load_processor(base)


# ---------------------------------------------------------------------- dates


def test_fixed_times_are_those_of_one_moment() -> None:
    moment = datetime(2025, 1, 1, 12, tzinfo=UTC)
    values = {directive: moment.strftime(directive) for directive in FIXED_TIMES}
    assert values | {"%s": str(int(moment.timestamp()))} == FIXED_TIMES


@pytest.mark.parametrize("beginning", ["", "\n", "  {% if true %}x{% endif %}\n", "text "])
def test_a_template_with_a_date_is_the_same_every_day(beginning: str) -> None:
    tokenizer = tiny.build_tokenizer(bos=False)
    rows = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]

    def render(template: str) -> str:
        text = tokenizer.apply_chat_template(rows, chat_template=template, tokenize=False)
        assert isinstance(text, str)
        return text

    today = render(beginning + DATED_TEMPLATE)
    fixed = render(fix_date(beginning + DATED_TEMPLATE))
    weekday, date = "Wednesday", "01 January 2025"
    assert f"It is {weekday}, {date}." in fixed
    now = datetime.now()
    written = f"It is {now.strftime('%A')}, {now.strftime('%d %B %Y')}."
    assert fixed.replace(f"It is {weekday}, {date}.", written) == today
    assert fix_date(fix_date(DATED_TEMPLATE)) == fix_date(DATED_TEMPLATE)
    assert fix_date(beginning + CHAT_TEMPLATE) == beginning + CHAT_TEMPLATE


def test_a_saved_model_keeps_its_date(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "chat_template.jinja").write_text(DATED_TEMPLATE)
    chat_template._log_fixed_date.cache_clear()
    caplog.set_level(logging.INFO, "vlduet")
    model = DuetModel.from_pretrained(base)
    load_processor(base)
    assert caplog.text.count("asks for the date") == 1
    embeddings = model.encode(["a text"])
    model.save_pretrained(tmp_path / "model")
    # Another version of the base, or of the constant, does not change the model.
    (base / "chat_template.jinja").write_text(DATED_TEMPLATE.replace("It is", "Today is"))
    caplog.clear()
    reopened = DuetModel.from_pretrained(tmp_path / "model")
    assert not caplog.text
    assert (reopened.encode(["a text"]) == embeddings).all()
    reopened.save_merged(tmp_path / "merged")
    template = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert template == fix_date(DATED_TEMPLATE)
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert (merged.encode(["a text"]) == embeddings).all() and not caplog.text
