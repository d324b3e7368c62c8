"""Answers with images: where they come, what is searched, and how many forward passes it takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from helpers import tiny
from vlduet.data.records import ImageRef, Message
from vlduet.errors import ConfigError, DataError, ModelError, RetrievalError
from vlduet.model.conversation import render_conversation
from vlduet.model.generation import interleave
from vlduet.model.generation.continuous import ContinuousBatcher, Request
from vlduet.model.generation.interleave import (
    ImageOptions,
    InterleavedAnswer,
    RetrievedImage,
    TextDelta,
    split_template,
)
from vlduet.model.generation.slices import SliceEnd

QUESTION = (Message("user", ("tell me of a dog",)),)
SENTENCES = ("a dog runs.", "Then it sleeps.")
IMAGES = [tiny.random_image(seed, 16) for seed in range(4)]


@dataclass
class FakeHit:
    id: str
    image: ImageRef | None
    score: float
    text: str = ""
    metadata: dict = field(default_factory=dict)


class FakeIndex:
    """Index whose documents are ranked in a fixed order; records what is searched."""

    def __init__(self, *hits):
        self.hits = hits
        self.vectors = []
        self.filters = []

    def check_model(self, model):
        pass

    def check_image_search(self, where):
        if where == "unknown=1":
            raise RetrievalError("no document has the key unknown")

    def search_vector(self, vector, *, k, where):
        self.vectors.append(vector)
        self.filters.append(where)
        return self.hits[:k]


def image_hits(*scores):
    return [FakeHit(f"image-{i}", IMAGES[i], score) for i, score in enumerate(scores)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interleave") / "base"
    return tiny.scale_up_weights(tiny.build_duet_model(folder))


@pytest.fixture
def script(model, monkeypatch):
    """Make every answer that `interleave` generates the tokens of `SENTENCES`, and return them."""
    answer = (Message("assistant", (" ".join(SENTENCES),)),)
    sequence = render_conversation(model.renderer, QUESTION + answer)
    prompt = model.renderer.render_chat(QUESTION, add_generation_prompt=True)
    token_ids = [*sequence.token_ids[len(prompt) :], model.renderer.eos_token_ids[0]]

    class PrescribedRequest(Request):
        def sample_token(self, logits):
            return torch.tensor([token_ids[len(self.token_ids)]])

    monkeypatch.setattr(interleave, "Request", PrescribedRequest)
    return token_ids


@pytest.fixture
def forward_passes(model):
    """Return a list that gets an entry for every forward pass of the language model."""
    passes = []
    handle = model.backbone.language_model.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    handle.remove()


def run(model, index, **options):
    """Return the events of an answer with neighbouring texts joined."""
    events = []
    for event in model.interleave(QUESTION, index, **options):
        if isinstance(event, TextDelta) and events and isinstance(events[-1], str):
            events[-1] += event.text
        else:
            events.append(event.text if isinstance(event, TextDelta) else event)
    return events


def conversation(*parts):
    return (*QUESTION, Message("assistant", parts))


def test_an_image_follows_every_sentence_and_is_searched_with_the_text_before_it(model, script):
    index = FakeIndex(*image_hits(0.5, 0.4))
    first, image, second, other_image = run(model, index, max_new_tokens=99)
    assert (first.strip(), second.strip()) == SENTENCES  # the blank is a token of its own
    assert (image.hit.id, image.slice, image.score) == ("image-0", 0, 0.5)
    assert (other_image.hit.id, other_image.slice) == ("image-1", 1)  # none is shown twice
    expected = [conversation(SENTENCES[0]), conversation(" ".join(SENTENCES))]
    np.testing.assert_allclose(index.vectors, model.encode(expected), atol=1e-5)


def test_retrieval_takes_no_forward_pass_of_its_own(model, script, forward_passes):
    index = FakeIndex(*image_hits(0.5, 0.4))
    run(model, index, max_new_tokens=99)
    assert len(index.vectors) == 2
    assert len(forward_passes) == len(script)  # a prompt, and one for each token but the last


def test_a_fed_back_image_takes_one_forward_pass_and_changes_what_is_searched_next(
    model, script, forward_passes
):
    index = FakeIndex(*image_hits(0.5, 0.4))
    events = run(model, index, feed_back=True, max_new_tokens=99)
    images = [event for event in events if isinstance(event, RetrievedImage)]
    assert [image.is_fed_back for image in images] == [True, False]  # the answer ends at the last
    assert len(forward_passes) <= 1 + len(script) + 1
    # The reference has the tokens of the answer: after an image, a text has another first token.
    prefix = render_conversation(model.renderer, conversation(SENTENCES[0], IMAGES[0]))
    other = render_conversation(model.renderer, conversation(" ".join(SENTENCES)))
    alone = model.encode([conversation(" ".join(SENTENCES))])[0]
    assert len(prefix) > len(other) - len(script)
    assert np.abs(index.vectors[1] - alone).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (ImageOptions(threshold=0.45), ["image-0"]),
        (ImageOptions(threshold=0.9), []),
        (ImageOptions(max_images=1), ["image-0"]),
    ],
)
def test_images_below_the_threshold_and_beyond_the_number_are_left_out(model, script, options, ids):
    events = run(model, FakeIndex(*image_hits(0.5, 0.4)), images=options, max_new_tokens=99)
    assert [event.hit.id for event in events if isinstance(event, RetrievedImage)] == ids
    assert "".join(event for event in events if isinstance(event, str)) == " ".join(SENTENCES)


def test_documents_without_an_image_are_passed_over_and_the_filter_is_used(model, script):
    texts = [FakeHit(f"text-{i}", None, 0.9) for i in range(6)]
    index = FakeIndex(*texts, *image_hits(0.2))
    events = run(model, index, images=ImageOptions(where="kind=a"), max_new_tokens=99)
    assert [event.hit.id for event in events if isinstance(event, RetrievedImage)] == ["image-0"]
    assert set(index.filters) == {"kind=a"}


def test_an_empty_index_leaves_the_text_as_it_is(model, script):
    assert run(model, FakeIndex(), max_new_tokens=99) == [" ".join(SENTENCES)]


def test_an_answer_that_is_cut_has_no_image_after_its_last_sentence(model, script):
    events = run(model, FakeIndex(*image_hits(0.5, 0.4)), max_new_tokens=len(script) - 2)
    assert [event.hit.id for event in events if isinstance(event, RetrievedImage)] == ["image-0"]


def test_places_of_a_template_get_the_best_image_in_one_pass_each(model, forward_passes):
    index = FakeIndex(*image_hits(0.5, 0.4))
    template = "a dog runs: {image} Then {image}."
    options = ImageOptions(threshold=0.9)  # for the ends of sentences only
    events = run(model, index, template=template, images=options)
    texts = [event for event in events if isinstance(event, str)]
    assert texts == ["a dog runs:", " Then", "."]
    assert [event.slice for event in events if not isinstance(event, str)] == [0, 1]
    assert len(forward_passes) == 2
    expected = [conversation("a dog runs:"), conversation("a dog runs: Then")]
    np.testing.assert_allclose(index.vectors, model.encode(expected), atol=1e-5)


def test_a_template_may_begin_with_an_image_and_have_two_in_one_place(model, forward_passes):
    index = FakeIndex(*image_hits(0.5, 0.4, 0.3))
    events = run(model, index, template="{image}{image} a dog {image}")
    contents = [event if isinstance(event, str) else event.hit.id for event in events]
    assert contents == ["image-0", "image-1", " a dog", "image-2"]
    assert len(forward_passes) == 2
    # The first place is where the question ends.
    np.testing.assert_allclose(index.vectors[0], model.encode([QUESTION])[0], atol=1e-5)
    np.testing.assert_array_equal(index.vectors[0], index.vectors[1])


def test_images_of_a_template_are_fed_back(model, forward_passes):
    index = FakeIndex(*image_hits(0.5, 0.4, 0.3))
    run(model, index, template="a dog{image}{image} Then {image}.", feed_back=True)
    assert len(forward_passes) == 3
    expected = [
        conversation("a dog"),
        conversation("a dog", IMAGES[0]),
        conversation("a dog", IMAGES[0], IMAGES[1], " Then"),
    ]
    np.testing.assert_allclose(index.vectors, model.encode(expected), atol=1e-5)


def test_an_image_that_does_not_fit_the_window_is_not_fed_back(model, script, monkeypatch, caplog):
    prompt = model.renderer.render_chat(QUESTION, add_generation_prompt=True)
    config = model.backbone.model.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", len(prompt) + 99, raising=False)
    events = run(model, FakeIndex(*image_hits(0.5, 0.4)), feed_back=True, max_new_tokens=98)
    images = [event for event in events if isinstance(event, RetrievedImage)]
    assert [image.is_fed_back for image in images] == [False, False]
    assert "image-0: shown and not read" in caplog.text


def test_a_broken_image_does_not_end_the_answer(model, script, caplog):
    broken = FakeHit("broken", ImageRef(data=b"no image"), 0.5)
    events = run(model, FakeIndex(broken), feed_back=True, max_new_tokens=99)
    (image,) = [event for event in events if isinstance(event, RetrievedImage)]
    assert not image.is_fed_back
    assert "".join(event for event in events if isinstance(event, str)) == " ".join(SENTENCES)
    assert "broken: shown and not read" in caplog.text


def test_concurrent_answers_equal_those_of_one_at_a_time(model):
    """Two interleaved answers with images of their own, and a plain one, share one batch."""

    def start(index, **options):
        answer = InterleavedAnswer(model, QUESTION, Request(24), **options)
        return answer, index

    def serve(jobs, plain=None):
        batcher = ContinuousBatcher(model.backbone, model.renderer.eos_token_ids)
        answers = {answer.request: (answer, index) for answer, index in jobs}
        prompts = [answer.render_prompt(model.renderer) for answer, _ in jobs]
        requests = list(answers)
        if plain is not None:
            prompts.append(model.renderer.render_chat(QUESTION, add_generation_prompt=True))
            requests.append(plain)
        outputs = batcher.add_requests(model.prefill_inputs(prompts), requests)
        contents = {request: [] for request in requests}
        while outputs:
            following = []
            for request, output in outputs:
                assert not isinstance(output, Exception)
                if not isinstance(output, SliceEnd):
                    contents[request].append(output.text)
                    continue
                answer, index = answers[request]
                hit = answer.find_image(index, answer.embed(output))
                num_cached = batcher.count_cached_tokens(request)
                step = answer.advance(model.renderer, hit, output, num_cached=num_cached)
                contents[request].append(hit and hit.id)
                if step.sequence is None:
                    following += batcher.resume(request)
                else:
                    inputs = model.prefill_inputs([step.sequence], num_past=num_cached)
                    following += batcher.extend(request, inputs)
            outputs = following + batcher.step()
        return list(contents.values())

    def jobs():
        return [
            start(FakeIndex(*image_hits(0.5, 0.4)), feed_back=True),
            start(FakeIndex(*reversed(image_hits(0.5, 0.4, 0.3)))),
        ]

    first, second = jobs()
    alone = serve([first]) + serve([second]) + serve([], Request(24))
    assert serve(jobs(), Request(24)) == alone


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"template": "no place"}, ConfigError, r"template: no place of an image"),
        ({"template": "{image}" * 9}, ConfigError, r"template: 9 places .* at most 8"),
        ({"images": ImageOptions(where="unknown=1")}, RetrievalError, "the key unknown"),
        ({"template": "{image}" + "a " * 5000 + "{image}"}, DataError, "answer of up to 9999"),
        ({"max_new_tokens": 1 << 20}, DataError, r"messages: .* the model's window is"),
    ],
)
def test_unusable_options_are_refused_before_anything_is_generated(model, options, error, message):
    with pytest.raises(error, match=message):
        model.interleave(QUESTION, FakeIndex(), **options)


@pytest.mark.parametrize("options", [{"threshold": 2.0}, {"threshold": np.nan}, {"max_images": 0}])
def test_options_of_images_are_checked(options):
    with pytest.raises(ConfigError):
        ImageOptions(**options)


def test_a_model_whose_embeddings_are_means_of_all_tokens_is_refused(model):
    prompts = model.prompts
    model.set_prompts(tiny.Prompts(pool="mean"))
    try:
        with pytest.raises(ModelError, match="means over all tokens"):
            model.interleave(QUESTION, FakeIndex())
    finally:
        model.set_prompts(prompts)


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("A day: {image} Then {image}.", ["A day:", " Then", "."]),
        ("{image}A{image}", ["", "A", ""]),
        ("A {image}, B{image}{image}\n", ["A", ", B", "", ""]),
        ("A{image} (B) {image}「C」", ["A", " (B)", " 「C」"]),
    ],
)
def test_split_template(template, texts):
    assert split_template(template) == texts
