"""Answers in one batch, whoever joins and leaves: every token is what the whole forward of one conversation alone says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from helpers import tiny
from vlduet.data.records import Message
from vlduet.data.sequences import IGNORE_INDEX, Sequence
from vlduet.errors import ModelError
from vlduet.model.generation import beam, continuous
from vlduet.model.generation.continuous import (
    ContinuousBatcher,
    Delta,
    Request,
    SamplingParams,
    holdback_lengths,
)

FAMILIES = sorted(tiny.FAMILY_BUILDERS)
WIDE, TALL = tiny.random_image(0, 16, width=48), tiny.random_image(1, 24, width=16)
ASKED = [
    ("what?",),
    (WIDE, "what is it?"),
    (TALL, WIDE, "tell me a long story, and then another one"),
    ("a", TALL),
]
EXACT = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def bold(request, tmp_path_factory):
    """A model whose weights are large enough that a wrong position or a wrong neighbour shows."""
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path_factory.mktemp(request.param) / "base", family=request.param)
    )


class Dictated(Request):
    """Writes what it is told, and keeps what it was offered."""

    def __init__(self, text: list[int]):
        super().__init__(len(text))
        self.text, self.offered = text, []

    def sample_token(self, scores):
        self.offered.append(scores[0].clone())
        return torch.tensor([self.text[len(self.token_ids)]])


def prompt(model, parts):
    return model.renderer.chat((Message("user", parts),), answer=True)


def alone(model, sequence, ids):
    """Logits after the prompt and every token but the last, float[n, V]: one forward, no cache, no company."""
    whole = (*sequence.ids, *ids[:-1])
    sequence = Sequence(whole, (IGNORE_INDEX,) * len(whole), (), sequence.images)
    with torch.no_grad():
        hidden = model.hidden_states(model.collate([sequence]))[0, -len(ids) :]
        scores = model.backbone.logits(hidden)
    scores[:, beam.suppressed_tokens(model.backbone, model.renderer.eos_ids)] = -torch.inf
    scores[0, model.renderer.eos_ids] = -torch.inf
    return scores


def test_whoever_comes_and_goes_sees_what_it_would_alone(bold):
    """Two begin; one ends and another comes; a long prompt beside a short cache and the other way round."""
    decoder = ContinuousBatcher(bold.backbone, bold.renderer.eos_ids)
    words = [i for i in range(10, 60) if i not in beam.suppressed_tokens(bold.backbone, [])]
    texts = [words[n : n + length] for n, length in enumerate([2, 9, 6, 3])]
    sequences = [prompt(bold, parts) for parts in ASKED]
    answers = [Dictated(text) for text in texts]
    comes = {0: [0, 1], 2: [2], 5: [3], 9: [1]}
    repeated = Dictated(texts[1])
    told: dict[Request, list[Delta]] = {}
    tick = 0
    while decoder.requests or tick <= max(comes):
        if some := comes.get(tick):
            joining = [repeated if tick == 9 else answers[i] for i in some]
            for answer, piece in decoder.add_requests(
                bold.start([sequences[i] for i in some]), joining
            ):
                told.setdefault(answer, []).append(piece)
        for answer, piece in decoder.step():
            told.setdefault(answer, []).append(piece)
        tick += 1
    for sequence, answer in zip([*sequences, sequences[1]], [*answers, repeated], strict=True):
        assert_close(torch.stack(answer.offered), alone(bold, sequence, answer.text), **EXACT)
        assert [piece.completion_tokens for piece in told[answer]] == list(
            range(1, len(answer.text) + 1)
        )
        assert [piece.finish_reason for piece in told[answer]] == [None] * (
            len(answer.text) - 1
        ) + ["length"]
        assert {piece.prompt_tokens for piece in told[answer]} == {len(sequence)}
        text = bold.backbone.tokenizer.decode(answer.text, skip_special_tokens=True)
        assert "".join(piece.text for piece in told[answer]) == text


def test_padding_goes_with_who_needed_it(model):
    decoder = ContinuousBatcher(model.backbone, [])
    short, long = (prompt(model, (text,)) for text in ("a", "a long long long long question"))
    decoder.add_requests(model.start([long, short]), [Request(2), Request(4)])
    assert decoder._kv_state.attention_mask.shape == (2, len(long))
    decoder.step()
    assert (
        decoder._kv_state.attention_mask.shape == (1, len(short) + 1)
        and decoder._kv_state.attention_mask.all()
    )
    assert decoder._kv_state.past_key_values.get_seq_length() == len(short) + 1


def test_what_transformers_chooses(bold, monkeypatch):
    """Greedy and sampled from one seed, with the habits that a checkpoint's generation config asks for."""
    habits = bold.backbone.model.generation_config
    start = bold.start([prompt(bold, ASKED[1])])
    found = []
    for penalty, ngram in ((1.0, 0), (1.9, 0), (1.0, 1)):
        monkeypatch.setattr(habits, "repetition_penalty", penalty)
        monkeypatch.setattr(habits, "no_repeat_ngram_size", ngram)
        for temperature in (0.0, 0.3, 1, 2):
            torch.manual_seed(0)
            with beam.generate_arguments(
                bold.backbone, start, 12, temperature=temperature
            ) as given:
                whole = bold.backbone.model.generate(**given)[0].tolist()
            torch.manual_seed(0)
            decoder, answer = (
                ContinuousBatcher(bold.backbone, start.eos_ids),
                Request(12, sampling_params=SamplingParams(temperature)),
            )
            decoder.add_requests(start, [answer])
            while decoder.step():
                pass
            assert answer.token_ids == whole
            found.append(tuple(whole))
    assert len(set(found[:4])) >= 3, "else temperature would change nothing"


def test_a_penalty_is_that_of_transformers(model, monkeypatch):
    monkeypatch.setattr(model.backbone.model.generation_config, "repetition_penalty", 1.7)
    text = [10, 11, 10]
    answer = Dictated(text)
    sequence = prompt(model, ASKED[0])
    decoder = ContinuousBatcher(model.backbone, model.renderer.eos_ids)
    decoder.add_requests(model.start([sequence]), [answer])
    while decoder.step():
        pass
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    free = alone(model, sequence, text)
    wanted = [
        penalty(torch.tensor([text[:n]], dtype=torch.long), free[n : n + 1])[0] for n in range(3)
    ]
    assert_close(torch.stack(answer.offered), torch.stack(wanted), **EXACT)


def test_an_answer_samples_by_itself(model):
    """A seed gives the same words whoever is beside it and whatever torch's generator does; greedy ones stay greedy."""

    def answered(seeds, *, noise):
        torch.manual_seed(noise)
        answers = [
            Request(8, sampling_params=SamplingParams(0.0 if seed is None else 2.0, 0.9, seed))
            for seed in seeds
        ]
        decoder = ContinuousBatcher(model.backbone, [])
        decoder.add_requests(model.start([prompt(model, ASKED[0])] * len(seeds)), answers)
        while decoder.requests:
            decoder.step()
        return [answer.token_ids for answer in answers]

    one, greedy, other = answered([7, None, 8], noise=0)
    assert one != other and one != greedy
    assert [[other], [greedy], [one]] == [answered([seed], noise=1) for seed in (8, None, 7)]


def test_a_temperature_is_what_logits_are_divided_by():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for temperature in (0.5, 1, 2.0):
        answer = Request(1, sampling_params=SamplingParams(temperature, seed=0))
        drawn = torch.cat([answer.sample_token(scores.clone()) for _ in range(600)])
        assert_close(
            torch.bincount(drawn, minlength=4) / 600,
            (scores[0] / temperature).softmax(0),
            atol=0.06,
            rtol=0,
        )


def test_only_the_likeliest_are_sampled():
    scores = torch.tensor([[2.0, 1.5, 0.0, -3.0]])
    answer = Request(1, sampling_params=SamplingParams(temperature=1.0, top_p=0.7, seed=0))
    drawn = torch.cat([answer.sample_token(scores.clone()) for _ in range(400)])
    allowed = TopPLogitsWarper(0.7)(torch.empty(0), scores)[0].softmax(0)
    assert_close(torch.bincount(drawn, minlength=4) / 400, allowed, atol=0.08, rtol=0)
    assert set(drawn.tolist()) == {0, 1}


def test_broken_logits_end_their_own_answer(model, monkeypatch):
    real = model.backbone.lm_head.forward

    def overflowing(hidden):
        logits = real(hidden)
        logits[1:2, 3] = torch.nan
        return logits

    decoder = ContinuousBatcher(model.backbone, [])
    fine, broken = Request(3), Request(3, sampling_params=SamplingParams(1.0))
    monkeypatch.setattr(model.backbone.lm_head, "forward", overflowing)
    (_, piece), (_, error) = decoder.add_requests(
        model.start([prompt(model, ASKED[0])] * 2), [fine, broken]
    )
    assert isinstance(piece, Delta) and isinstance(error, ModelError) and "not finite" in str(error)
    assert decoder.requests == [fine]
    while decoder.requests:
        decoder.step()
    assert len(fine.token_ids) == 3
    monkeypatch.setattr(model.backbone.lm_head, "forward", lambda hidden: real(hidden) * torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        list(model.generate((Message("user", ("x",)),), stream=True))


def test_what_goes_wrong_with_a_row_is_told_of_it(model):
    fine, broken = Request(3), Request(3, sampling_params=SamplingParams("hot"))
    decoder = ContinuousBatcher(model.backbone, [])
    (_, piece), (_, error) = decoder.add_requests(
        model.start([prompt(model, ASKED[0])] * 2), [fine, broken]
    )
    assert isinstance(piece, Delta) and isinstance(error, TypeError) and decoder.requests == [fine]
    with pytest.raises(ValueError, match="an answer of 0 tokens"):
        Request(0)


@pytest.mark.parametrize("place", ["prompt", "beside"])
def test_who_cannot_join_changes_nothing(model, monkeypatch, place):
    """Memory that is not there for its prompt, or for its keys and values beside the others'."""

    def no_memory(*_):
        raise RuntimeError("out of memory")

    sequence = prompt(model, ASKED[0])
    decoder, text = ContinuousBatcher(model.backbone, model.renderer.eos_ids), [10, 11, 12]
    answer = Dictated(text)
    decoder.add_requests(model.start([sequence]), [answer])
    start = model.start([prompt(model, ASKED[3])])
    with monkeypatch.context() as patched:
        patched.setattr(
            *(
                (model.backbone.lm_head, "forward")
                if place == "prompt"
                else (continuous, "_stacked")
            ),
            no_memory,
        )
        with pytest.raises(RuntimeError, match="out of memory"):
            decoder.add_requests(start, [Request(3)])
    while decoder.step():
        pass
    assert_close(torch.stack(answer.offered), alone(model, sequence, text), **EXACT)


def test_what_nobody_wants_leaves(model):
    decoder = ContinuousBatcher(model.backbone, [])
    kept, left = Request(5), Request(5)
    decoder.add_requests(model.start([prompt(model, ASKED[0])] * 2), [kept, left])
    left.is_finished = True
    assert [answer for answer, _ in decoder.step()] == [kept] == decoder.requests
    kept.is_finished = True
    assert decoder.step() == [] == decoder.requests
    assert decoder._kv_state is None, "nor what it had read"


def test_it_is_in_evaluation_only_while_it_works(model):
    """Between two pieces the reader may do what it likes: train, or compute gradients."""
    model.train()
    try:
        pieces = model.generate(
            (Message("user", ("say something",)),), max_new_tokens=8, stream=True
        )
        for _ in pieces:
            assert model.backbone.model.training and torch.is_grad_enabled()
    finally:
        model.eval()


LETTERS = "ab \N{RIGHTWARDS ARROW}"


@given(
    st.text(LETTERS, max_size=12), st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=2)
)
def test_what_is_told_is_never_taken_back(text, stop):
    """Told byte by byte, nothing of a stop string that is still being written gets out, half characters in it or not."""
    cut = min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))
    told, whole = 0, text.encode()
    for end in range(len(whole) + 1):
        written = whole[:end].decode(errors="replace")
        if any(each in written for each in stop):
            break
        told = max(told, len(written) - max(holdback_lengths(written, stop), default=0))
        assert told <= cut and text.startswith(written[:told])
        if written.endswith((" ", "\N{REPLACEMENT CHARACTER}")):
            assert told < len(written), "the next token may change these"
