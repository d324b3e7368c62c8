"""What precedes a learned answer has exactly the tokens that an answer is prompted with."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from copy import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny
from helpers.word_tokenizers import WORD_TOKENIZERS, build_word_tokenizer
from vlduet.data.records import ImageRef, Message
from vlduet.data.sequences import IGNORE_INDEX, PreparedImage, Sequence
from vlduet.model import chat_layout
from vlduet.model.processing import Processor, load_processor
from vlduet.model.prompts import Prompts, Renderer

PIECES = [
    *("a", "A", "red", "circle", "'s", "5", "12"),
    *(" ", "  ", "\n", "\n\n", ".", ":", ")", "😀", "中", "文", "é", "e\u0301", "\u0301"),
    *("</s>", "<image>", "<|user|>", "<|assistant|>"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
CHATS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)
EXAMPLES = settings(max_examples=12, deadline=None)
IMAGE = tiny.random_image(1)


def write_template(user: str, assistant: str, prompt: str, *, text: str = "text") -> str:
    """Return a template of turns with contents as strings or lists; `{}` is the text."""
    content = (
        "{% set text = m['content'] if m['content'] is string else '' %}"
        "{% if m['content'] is not string %}{% set parts = namespace(text='') %}"
        "{% for p in m['content'] %}"
        "{% set parts.text = parts.text + (p['text'] if p['type'] == 'text' else '<image>') %}"
        "{% endfor %}{% set text = parts.text %}{% endif %}"
    )
    bodies = [turn.replace("{}", f"' + ({text}) + '") for turn in (user, assistant)]
    return (
        f"{{% for m in messages %}}{content}"
        f"{{{{ '{bodies[0]}' if m['role'] == 'user' else '{bodies[1]}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}"
    )


TEMPLATES = {
    "line ends": write_template(
        r"<|user|>\n{}</s>\n", r"<|assistant|>\n{}</s>\n", r"<|assistant|>\n"
    ),
    "space in history": write_template(r"User: {}</s>\n", r"Assistant: {}</s>\n", "Assistant:"),
    "space in prompt": write_template(r"User: {}</s>\n", r"Assistant: {}</s>\n", "Assistant: "),
    "two spaces": write_template("<|user|>{}</s>", "<|assistant|>  {}</s>", "<|assistant|>  "),
    "no special tokens": write_template("USER: {} ", "ASSISTANT: {} ", "ASSISTANT:"),
    "no special tokens, line ends": write_template(
        r"### Human: {}\n", r"### Assistant:\n{}\n", r"### Assistant:\n"
    ),
    "stripped": write_template(
        "<|user|> {}</s>", "<|assistant|> {}</s>", "<|assistant|> ", text="text | trim"
    ),
    "no generation prompt": write_template("[INST] {} [/INST]", " {}</s>", ""),
    "adjacent": write_template("{}", "{}</s>", ""),
}


@cache
def make_renderer(kind: str, template: str) -> Renderer:
    """Return a renderer with a tokenizer of a type, for images of three tokens."""
    tokenizer = build_word_tokenizer(kind)
    tokenizer.chat_template = TEMPLATES[template]
    image = PreparedImage({"pixel_values": torch.zeros(1)}, 3, "")
    processor = Processor(
        tokenizer,
        lambda ref: image,
        image_token_id=tiny.SPECIAL_TOKENS.index("<image>"),
        image_delimiters=("", ""),
        image_placeholder="<image>",
        eos_token_ids=(tokenizer.eos_token_id,),
    )
    return Renderer(processor, prompts=Prompts())


def make_chat(turns: Iterable[tuple[str, str]], image: ImageRef | None = None) -> list[Message]:
    messages = []
    for question, answer in turns:
        parts = (question,) if image is None or messages else (image, question)
        messages += [Message("user", parts), Message("assistant", (answer,))]
    return messages


def find_answers(sequence: Sequence) -> list[range]:
    """Return the positions of every run of labels."""
    runs: list[range] = []
    for i, label in enumerate(sequence.labels):
        if label != IGNORE_INDEX:
            is_new = not runs or runs[-1].stop != i or sequence.labels[i - 1] == 2
            runs = (
                [*runs, range(i, i + 1)] if is_new else [*runs[:-1], range(runs[-1].start, i + 1)]
            )
    return runs


def check_answers(renderer: Renderer, messages: list[Message], *, is_exact: bool = True) -> None:
    """Assert that every answer is learned after the tokens of its prompt, and decodes to itself."""
    sequence = renderer.render_chat(tuple(messages), add_generation_prompt=False)
    answers = find_answers(sequence)
    assert len(answers) == len(messages) // 2
    for number, answer in enumerate(answers):
        before = tuple(messages[: 2 * number + 1])
        prompt = renderer.render_chat(before, add_generation_prompt=True)
        assert sequence.token_ids[: answer.start] == prompt.token_ids
        *token_ids, end = sequence.token_ids[answer.start : answer.stop]
        assert end == renderer.eos_token_ids[0]
        text = renderer.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        expected = messages[2 * number + 1].parts[0]
        assert isinstance(text, str) and isinstance(expected, str)
        if is_exact:
            assert normalize(text) == normalize(expected)


def normalize(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", WORD_TOKENIZERS)
@EXAMPLES
@given(turns=CHATS)
def test_an_answer_follows_the_tokens_of_its_prompt(
    kind: str, template: str, turns: list[tuple[str, str]]
) -> None:
    renderer = make_renderer(kind, template)
    # A unigram model without byte fallback does not know all characters.
    check_answers(renderer, make_chat(turns, IMAGE), is_exact=kind != "unigram")


@pytest.mark.parametrize("family_name", tiny.FAMILY_BUILDERS)
def test_an_answer_follows_the_tokens_of_its_prompt_in_every_family(
    family_name: str, tmp_path: Path
) -> None:
    processor = load_processor(tiny.FAMILY_BUILDERS[family_name](tmp_path))
    renderer = Renderer(processor, prompts=Prompts())

    @settings(max_examples=10, deadline=None)
    @given(turns=CHATS)
    def check(turns: list[tuple[str, str]]) -> None:
        check_answers(renderer, make_chat(turns, IMAGE))

    check()


WORDS = st.lists(
    st.sampled_from(["a", "red", "circle.", "What?", "12", "中", "😀", "é"]), min_size=1
)
SENTENCES = WORDS.map(" ".join)


@pytest.mark.parametrize(
    "template",
    # The others lack the end of a turn, or have nothing between a question and its answer.
    [name for name in TEMPLATES if "no special" not in name and name != "adjacent"],
)
@pytest.mark.parametrize("kind", WORD_TOKENIZERS)
@settings(max_examples=10, deadline=None)
@given(turns=st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=2))
def test_tokens_are_those_of_transformers(
    kind: str, template: str, turns: list[tuple[str, str]]
) -> None:
    renderer = make_renderer(kind, template)
    chat = make_chat(turns, IMAGE)
    rows = []
    for message in chat:
        parts = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}
            for p in message.parts
        ]
        rows.append({"role": message.role, "content": parts})
    text = renderer.tokenizer.apply_chat_template(rows, tokenize=False)
    assert isinstance(text, str)
    token_ids = renderer.tokenizer(text.replace("<image>", "<image>" * 3)).input_ids
    sequence = renderer.render_chat(tuple(chat), add_generation_prompt=False)
    assert list(sequence.token_ids) == token_ids


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", WORD_TOKENIZERS)
@EXAMPLES
@given(caption=TEXTS)
def test_a_caption_follows_the_tokens_that_embed_its_image(
    kind: str, chat: bool, caption: str
) -> None:
    renderer = make_renderer(kind, "space in prompt").with_options(prompts=Prompts(chat=chat))
    sequence = renderer.render_caption(IMAGE, caption)
    embedding = renderer.render_embedding((IMAGE,))
    (answer,) = find_answers(sequence)
    assert sequence.token_ids[: answer.start] == embedding.token_ids
    assert embedding.token_ids == renderer.render_caption_request(IMAGE, "").token_ids
    assert sequence.anchors[0].end == answer.start
    token_ids = list(sequence.token_ids[answer.start : -1])
    if kind != "unigram":
        text = renderer.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str) and normalize(text) == normalize(caption)


@pytest.mark.parametrize("kind", WORD_TOKENIZERS)
@EXAMPLES
@given(text=SENTENCES)
def test_an_embedded_text_has_the_tokens_of_its_prompt_as_one_text(kind: str, text: str) -> None:
    prompts = Prompts(text="Text: {text} \nSummarize:", chat=False, query="Find ")
    renderer = make_renderer(kind, "line ends").with_options(prompts=prompts)
    sequence = renderer.render_embedding((text,), is_query=True)
    expected = renderer.tokenizer(f"Text: Find {text} \nSummarize:").input_ids
    assert list(sequence.token_ids) == expected
    assert sequence.anchors[0].end == len(expected)


@pytest.mark.parametrize("kind", WORD_TOKENIZERS)
def test_user_text_never_has_special_tokens(kind: str) -> None:
    renderer = make_renderer(kind, "line ends")
    text = "".join(tiny.SPECIAL_TOKENS) * 2
    special_ids = range(len(tiny.SPECIAL_TOKENS))
    plain = renderer.render_chat(tuple(make_chat([("q", "a")])), add_generation_prompt=False)
    sequence = renderer.render_chat(tuple(make_chat([(text, text)])), add_generation_prompt=False)
    special = [i for i in sequence.token_ids if i in special_ids]
    assert special == [i for i in plain.token_ids if i in special_ids]
    decoded = renderer.tokenizer.decode(list(sequence.token_ids))
    assert isinstance(decoded, str)
    assert decoded.replace(" ", "").count(text) == 2


def test_a_turn_that_is_context_only_has_no_labels() -> None:
    renderer = make_renderer("byte-level BPE", "line ends")
    chat = make_chat([("What?", "A red circle."), ("is", "it.")])
    chat[1] = Message("assistant", chat[1].parts, supervised=False)
    sequence = renderer.render_chat(tuple(chat), add_generation_prompt=False)
    (answer,) = find_answers(sequence)
    assert renderer.tokenizer.decode(sequence.token_ids[answer.start : answer.stop]) == "it.</s>"
    supervised = make_chat([("What?", "A red circle."), ("is", "it.")])
    complete = renderer.render_chat(tuple(supervised), add_generation_prompt=False)
    assert sequence.token_ids == complete.token_ids


THINKING = write_template("<|user|>{}</s>", "<|assistant|>{}</s>", "<|assistant|>Summarize:")


def test_the_generation_prompt_replaces_what_history_has_before_the_last_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chat_layout._log_unlearned_answers.cache_clear()
    renderer = copy(make_renderer("byte-level BPE", "line ends"))
    renderer.tokenizer = build_word_tokenizer("byte-level BPE")
    renderer.tokenizer.chat_template = THINKING
    renderer._layouts = []
    chat = tuple(make_chat([("What?", "A red circle."), ("is", "it.")]))
    sequence = renderer.render_chat(chat, add_generation_prompt=False)
    (answer,) = find_answers(sequence)
    prompt = renderer.render_chat(chat[:-1], add_generation_prompt=True)
    assert sequence.token_ids[: answer.start] == prompt.token_ids
    text = renderer.tokenizer.decode(sequence.token_ids)
    assert text == (
        "<|user|>What?</s><|assistant|>A red circle.</s>"
        "<|user|>is</s><|assistant|>Summarize:it.</s>"
    )
    assert "only the last answer of a chat is learned" in caplog.text
