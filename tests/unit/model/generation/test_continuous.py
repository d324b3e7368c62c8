"""Continuous batching: every request gets the tokens that it would get alone.

The slow reference is one forward pass over a whole conversation, without cache and without other
requests.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from helpers import tiny
from vlduet.data.records import Message
from vlduet.data.sequences import IGNORE_INDEX, Sequence
from vlduet.errors import ModelError
from vlduet.model.generation import kv_state
from vlduet.model.generation.beam import generate_arguments
from vlduet.model.generation.continuous import (
    ContinuousBatcher,
    Delta,
    Request,
    SamplingParams,
)
from vlduet.model.generation.inputs import suppressed_tokens
from vlduet.model.generation.offline import generate_texts, generate_with_finish_reason

FAMILIES = sorted(tiny.FAMILY_BUILDERS)
WIDE = tiny.random_image(0, 16, width=48)
TALL = tiny.random_image(1, 24, width=16)
PROMPTS = [
    ("what?",),
    (WIDE, "what is it?"),
    (TALL, WIDE, "tell me a long story, and then another one"),
    ("a", TALL),
]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def large_weights_model(request, tmp_path_factory):
    """Return a model whose weights are large enough that a wrong position or neighbour shows."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return tiny.scale_up_weights(tiny.build_duet_model(folder, family=request.param))


class ScriptedRequest(Request):
    """Request that generates prescribed tokens and records the logits it was offered."""

    def __init__(self, script: list[int]):
        super().__init__(len(script))
        self.script = script
        self.logits = []

    def sample_token(self, logits):
        self.logits.append(logits[0].clone())
        return torch.tensor([self.script[len(self.token_ids)]])


def render(model, parts):
    """Return the sequence of a one-turn conversation, open for an answer."""
    return model.renderer.render_chat((Message("user", parts),), add_generation_prompt=True)


def create_batcher(model):
    return ContinuousBatcher(model.backbone, model.renderer.eos_token_ids)


def run_to_end(batcher):
    while batcher.requests:
        batcher.step()


def reference_logits(model, sequence, token_ids):
    """Return the logits float[n, V] before each of n answer tokens, from one forward pass."""
    all_ids = (*sequence.token_ids, *token_ids[:-1])
    sequence = Sequence(all_ids, (IGNORE_INDEX,) * len(all_ids), (), sequence.images)
    with torch.no_grad():
        hidden_states = model.hidden_states(model.collate([sequence]))[0, -len(token_ids) :]
        logits = model.backbone.compute_logits(hidden_states)
    eos_token_ids = model.renderer.eos_token_ids
    logits[:, suppressed_tokens(model.backbone, eos_token_ids)] = -torch.inf
    logits[0, eos_token_ids] = -torch.inf
    return logits


def test_requests_entering_and_leaving_get_the_logits_of_a_forward_pass_alone(
    large_weights_model,
):
    """Two requests begin; one ends and another enters; short prompts meet long caches."""
    model = large_weights_model
    batcher = create_batcher(model)
    suppressed = suppressed_tokens(model.backbone, [])
    allowed = [token_id for token_id in range(10, 60) if token_id not in suppressed]
    scripts = [allowed[n : n + length] for n, length in enumerate([2, 9, 6, 3])]
    requests = [ScriptedRequest(script) for script in scripts]
    sequences = [render(model, parts) for parts in PROMPTS]
    requests.append(ScriptedRequest(scripts[1]))  # the second prompt once more, later
    sequences.append(sequences[1])
    entering = {0: [0, 1], 2: [2], 5: [3], 9: [4]}  # step -> indices
    deltas: dict[Request, list[Delta]] = {request: [] for request in requests}
    step = 0
    while batcher.requests or step <= max(entering):
        outputs = []
        if indices := entering.get(step):
            prefill_inputs = model.prefill_inputs([sequences[i] for i in indices])
            outputs += batcher.add_requests(prefill_inputs, [requests[i] for i in indices])
        outputs += batcher.step()
        for request, delta in outputs:
            deltas[request].append(delta)
        step += 1
    for sequence, request in zip(sequences, requests, strict=True):
        script = request.script
        expected = reference_logits(model, sequence, script)
        assert_close(torch.stack(request.logits), expected, **TOLERANCE)
        counts = [delta.completion_tokens for delta in deltas[request]]
        assert counts == list(range(1, len(script) + 1))
        reasons = [delta.finish_reason for delta in deltas[request]]
        assert reasons == [None] * (len(script) - 1) + ["length"]
        assert {delta.prompt_tokens for delta in deltas[request]} == {len(sequence)}
        text = model.backbone.tokenizer.decode(script, skip_special_tokens=True)
        assert "".join(delta.text for delta in deltas[request]) == text


def test_padding_leaves_with_the_request_that_needed_it(model):
    batcher = ContinuousBatcher(model.backbone, [])
    short = render(model, ("a",))
    long = render(model, ("a long long long long question",))
    batcher.add_requests(model.prefill_inputs([long, short]), [Request(2), Request(4)])
    assert batcher._kv_state.attention_mask.shape == (2, len(long))
    batcher.step()
    assert batcher._kv_state.attention_mask.shape == (1, len(short) + 1)
    assert batcher._kv_state.attention_mask.all()
    assert batcher._kv_state.past_key_values.get_seq_length() == len(short) + 1


def test_tokens_equal_those_of_transformers_generate(large_weights_model, monkeypatch):
    """Greedy and sampled from one seed, with the generation config's logits processors."""
    model = large_weights_model
    config = model.backbone.model.generation_config
    prefill_inputs = model.prefill_inputs([render(model, PROMPTS[1])])
    answers = []
    for penalty, ngram_size in ((1.0, 0), (1.9, 0), (1.0, 1)):
        monkeypatch.setattr(config, "repetition_penalty", penalty)
        monkeypatch.setattr(config, "no_repeat_ngram_size", ngram_size)
        for temperature in (0.0, 0.3, 1, 2):
            torch.manual_seed(0)
            sampling = {"do_sample": True, "temperature": float(temperature)}
            with generate_arguments(model.backbone, prefill_inputs, 12, num_beams=1) as arguments:
                arguments |= sampling if temperature else {}
                expected = model.backbone.model.generate(**arguments)[0].tolist()
            torch.manual_seed(0)
            batcher = create_batcher(model)
            request = Request(12, sampling_params=SamplingParams(temperature))
            batcher.add_requests(prefill_inputs, [request])
            run_to_end(batcher)
            assert request.token_ids == expected
            answers.append(tuple(expected))
    assert len(set(answers[:4])) >= 3, "the temperature changed nothing"


def test_batch_of_prompts_gets_the_texts_of_transformers_generate(large_weights_model):
    """The left-padded batch, in which answers end at different times, is generated at once."""
    model = large_weights_model
    prefill_inputs = model.prefill_inputs([render(model, parts) for parts in PROMPTS])
    with generate_arguments(model.backbone, prefill_inputs, 24, num_beams=1) as arguments:
        token_ids = model.backbone.model.generate(**arguments)
    decoded = model.backbone.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    is_eos = torch.isin(token_ids, torch.tensor(prefill_inputs.eos_token_ids))
    reasons = ["stop" if ended else "length" for ended in is_eos.any(1).tolist()]
    expected = list(zip([text.strip() for text in decoded], reasons, strict=True))
    results = generate_with_finish_reason(model.backbone, prefill_inputs, 24)
    assert results == expected
    assert generate_texts(model.backbone, prefill_inputs, 24) == [text for text, _ in results]


def test_answers_that_end_by_themselves_finish_with_stop(model, monkeypatch):
    """A bias makes the end token the most likely second token."""
    bias = torch.zeros(model.lm_head_weight.shape[0])
    bias[model.renderer.eos_token_ids] = 100.0
    forward = model.backbone.lm_head.forward
    monkeypatch.setattr(model.backbone.lm_head, "forward", lambda states: forward(states) + bias)
    prefill_inputs = model.prefill_inputs([render(model, parts) for parts in PROMPTS[:2]])
    results = generate_with_finish_reason(model.backbone, prefill_inputs, 5)
    assert [reason for _, reason in results] == ["stop", "stop"]
    (_, reason), _ = generate_with_finish_reason(model.backbone, prefill_inputs, 1)
    assert reason == "length", "an answer of one token cannot end by itself"


def test_repetition_penalty_equals_that_of_transformers(model, monkeypatch):
    monkeypatch.setattr(model.backbone.model.generation_config, "repetition_penalty", 1.7)
    script = [10, 11, 10]
    request = ScriptedRequest(script)
    sequence = render(model, PROMPTS[0])
    batcher = create_batcher(model)
    batcher.add_requests(model.prefill_inputs([sequence]), [request])
    run_to_end(batcher)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    unpenalised = reference_logits(model, sequence, script)
    expected = []
    for n in range(3):
        generated = torch.tensor([script[:n]], dtype=torch.long)
        expected.append(processor(generated, unpenalised[n : n + 1])[0])
    assert_close(torch.stack(request.logits), torch.stack(expected), **TOLERANCE)


def test_seeded_request_samples_the_same_tokens_in_any_batch(model):
    """Neither other requests nor torch's global generator matter; greedy requests stay greedy."""

    def generate_ids(seeds, *, global_seed):
        torch.manual_seed(global_seed)
        requests = []
        for seed in seeds:
            params = SamplingParams(0.0 if seed is None else 2.0, 0.9, seed)
            requests.append(Request(8, sampling_params=params))
        batcher = ContinuousBatcher(model.backbone, [])
        sequences = [render(model, PROMPTS[0])] * len(seeds)
        batcher.add_requests(model.prefill_inputs(sequences), requests)
        run_to_end(batcher)
        return [request.token_ids for request in requests]

    seed_7, greedy, seed_8 = generate_ids([7, None, 8], global_seed=0)
    assert seed_7 != seed_8 and seed_7 != greedy
    assert generate_ids([8], global_seed=1) == [seed_8]
    assert generate_ids([None], global_seed=1) == [greedy]
    assert generate_ids([7], global_seed=1) == [seed_7]


def sample_frequencies(request, logits, *, count):
    """Return the relative frequency of each token among `count` samples."""
    samples = torch.cat([request.sample_token(logits.clone()) for _ in range(count)])
    return torch.bincount(samples, minlength=logits.shape[1]) / count


def test_temperature_divides_the_logits():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for temperature in (0.5, 1, 2.0):
        request = Request(1, sampling_params=SamplingParams(temperature, seed=0))
        frequencies = sample_frequencies(request, logits, count=600)
        assert_close(frequencies, (logits[0] / temperature).softmax(0), atol=0.06, rtol=0)


def test_top_p_samples_only_the_most_likely_tokens():
    logits = torch.tensor([[2.0, 1.5, 0.0, -3.0]])
    params = SamplingParams(temperature=1.0, top_p=0.7, seed=0)
    request = Request(1, sampling_params=params)
    frequencies = sample_frequencies(request, logits, count=400)
    expected = TopPLogitsWarper(0.7)(torch.empty(0), logits)[0].softmax(0)
    assert_close(frequencies, expected, atol=0.08, rtol=0)
    assert frequencies.nonzero().flatten().tolist() == [0, 1]


def test_logits_that_are_not_finite_finish_only_their_own_request(model, monkeypatch):
    forward = model.backbone.lm_head.forward

    def overflow_in_second_row(hidden_states):
        logits = forward(hidden_states)
        logits[1:2, 3] = torch.nan
        return logits

    batcher = ContinuousBatcher(model.backbone, [])
    healthy = Request(3)
    broken = Request(3, sampling_params=SamplingParams(1.0))
    monkeypatch.setattr(model.backbone.lm_head, "forward", overflow_in_second_row)
    prefill_inputs = model.prefill_inputs([render(model, PROMPTS[0])] * 2)
    (_, delta), (_, error) = batcher.add_requests(prefill_inputs, [healthy, broken])
    assert isinstance(delta, Delta)
    assert isinstance(error, ModelError) and "not finite" in str(error)
    assert broken.is_finished and batcher.requests == [healthy]
    run_to_end(batcher)
    assert len(healthy.token_ids) == 3
    monkeypatch.setattr(
        model.backbone.lm_head, "forward", lambda states: forward(states) * torch.nan
    )
    messages = (Message("user", ("x",)),)
    with pytest.raises(ModelError, match="not finite"):
        list(model.generate(messages, stream=True))
    with pytest.raises(ModelError, match="not finite"):
        model.generate(messages)


def test_error_of_one_request_is_its_own_output(model):
    healthy = Request(3)
    broken = Request(3, sampling_params=SamplingParams("hot"))
    batcher = ContinuousBatcher(model.backbone, [])
    prefill_inputs = model.prefill_inputs([render(model, PROMPTS[0])] * 2)
    (_, delta), (_, error) = batcher.add_requests(prefill_inputs, [healthy, broken])
    assert isinstance(delta, Delta) and isinstance(error, TypeError)
    assert batcher.requests == [healthy]


def test_request_without_tokens_is_rejected():
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        Request(0)


@pytest.mark.parametrize("failing_step", ["forward", "concatenation"])
def test_failed_prefill_leaves_running_requests_unchanged(model, monkeypatch, failing_step):
    """Memory may be missing for the prompt, or for its keys and values beside the others'."""

    def run_out_of_memory(*_):
        raise RuntimeError("out of memory")

    sequence = render(model, PROMPTS[0])
    batcher = create_batcher(model)
    script = [10, 11, 12]
    running = ScriptedRequest(script)
    batcher.add_requests(model.prefill_inputs([sequence]), [running])
    prefill_inputs = model.prefill_inputs([render(model, PROMPTS[3])])
    target = {
        "forward": (model.backbone.lm_head, "forward"),
        "concatenation": (kv_state, "_concatenate_left_padded"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*target[failing_step], run_out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            batcher.add_requests(prefill_inputs, [Request(3)])
    assert batcher.requests == [running]
    run_to_end(batcher)
    expected = reference_logits(model, sequence, script)
    assert_close(torch.stack(running.logits), expected, **TOLERANCE)


def test_cancelled_requests_leave_with_the_next_step(model):
    batcher = ContinuousBatcher(model.backbone, [])
    first, cancelled = Request(5), Request(5)
    prefill_inputs = model.prefill_inputs([render(model, PROMPTS[0])] * 2)
    batcher.add_requests(prefill_inputs, [first, cancelled])
    cancelled.is_finished = True
    outputs = batcher.step()
    assert [request for request, _ in outputs] == [first]
    assert batcher.requests == [first]
    first.is_finished = True
    assert batcher.step() == []
    assert batcher.requests == []
    assert batcher._kv_state is None, "the keys and values must be freed"


def test_streamed_text_equals_the_whole_answer(model):
    messages = [Message("user", (tiny.random_image(1), "what is it?"))]
    answer = model.generate(messages, max_new_tokens=12)
    pieces = list(model.generate(messages, max_new_tokens=12, stream=True))
    assert all(pieces)
    assert "".join(pieces).strip() == answer


def test_streaming_is_in_evaluation_mode_only_while_it_computes(model):
    """Between two pieces the caller may train or compute gradients."""
    model.train()
    try:
        pieces = model.generate(
            (Message("user", ("say something",)),), max_new_tokens=8, stream=True
        )
        states = [(model.backbone.model.training, torch.is_grad_enabled()) for _ in pieces]
    finally:
        model.eval()
    assert states and set(states) == {(True, True)}
