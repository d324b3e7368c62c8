"""Adapter of a model to lmms-eval.

Usage: ``python -m lmms_eval --model vlduet --model_args pretrained=DIR --tasks ...``

lmms-eval finds `manifest` by the entry point of the group ``lmms_eval.models``. The model is a
"simple" one in its terms: images come first, then the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vlduet.data.images import encode_png
from vlduet.data.records import ImageRef, Parts
from vlduet.errors import MissingExtraError
from vlduet.eval.predictions import ModelFunctions
from vlduet.harness.builtin import EvaluationSettings, model_functions
from vlduet.model.duet import DuetModel

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise MissingExtraError(
        "lmms-eval is not installed", fix="pip install 'vlduet[lmms]'"
    ) from error

DEFAULT_MAX_NEW_TOKENS = 128
"""Longest answer, in tokens, where a task does not say."""
MAX_REQUESTS_IN_MEMORY = 256
"""Number of requests whose images are in memory at once."""


def manifest() -> Any:
    """Return the entry that lmms-eval registers: the name of the model and its class."""
    return ModelManifest(model_id="vlduet", simple_class_path=f"{__name__}.LmmsModel")


class LmmsModel(lmms):  # type: ignore[misc]
    """Model as lmms-eval calls it.

    Prompts may be as long as the language model's context.

    Args:
        pretrained: folder of the model.
        system: system message before every question.
        batch_size, max_batch_size: given by lmms-eval and not used; batches are formed by length.
        device: device of the model, such as ``cuda:0``; None chooses one.

    Raises:
        ModelError: the folder has no model that can be opened.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        *,
        system: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self.model = DuetModel.from_pretrained(pretrained, device=device)
        settings = EvaluationSettings(system=system)
        self.functions: ModelFunctions = model_functions(self.model, settings)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return greedy answers in the order of the requests, each cut at the first stop string.

        Of a request's settings, ``max_new_tokens`` (or `DEFAULT_MAX_NEW_TOKENS`) and ``until``
        count; sampling is not supported. Raises DataError as `generate_answers` does.
        """
        generate = self.functions.generate
        assert generate is not None
        indices_by_limit: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            limit = int(request.args[1].get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS))
            indices_by_limit.setdefault(limit, []).append(i)
        answers = [""] * len(requests)
        for limit, all_indices in indices_by_limit.items():
            for begin in range(0, len(all_indices), MAX_REQUESTS_IN_MEMORY):
                indices = all_indices[begin : begin + MAX_REQUESTS_IN_MEMORY]
                prompts = [
                    self._build_prompt(requests[i].args[0], requests[i].args[2:]) for i in indices
                ]
                for i, text in zip(indices, generate(prompts, limit), strict=True):
                    stops = requests[i].args[1].get("until") or ()
                    answers[i] = truncate_at_stop(text, stops)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (log probability in nats of the continuation, False) for every request, in order.

        The continuation, a text or a function of the document, is scored as an answer with its end
        of turn. The second value should say whether it is the greedy one; it is not computed.
        Raises DataError as `answer_nlls` does.
        """
        continuation_nll = self.functions.continuation_nll
        assert continuation_nll is not None
        results = []
        for begin in range(0, len(requests), MAX_REQUESTS_IN_MEMORY):
            pairs = []
            for request in requests[begin : begin + MAX_REQUESTS_IN_MEMORY]:
                context, target, *location = request.args
                if not isinstance(target, str):
                    target = target(self._find_document(location))
                pairs.append((self._build_prompt(context, location), target))
            results += [(-total_nats, False) for total_nats, _ in continuation_nll(pairs)]
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise NotImplementedError: conversations that the task continues are not supported."""
        raise NotImplementedError(
            "vlduet answers one round; choose tasks of the type generate_until"
        )

    def _find_document(self, location: Sequence[Any]) -> Any:
        """Return the document at a location (function to get images, index, task, split)."""
        _, index, task, split = location
        return self.task_dict[task][split][index]

    def _build_prompt(self, context: str, location: Sequence[Any]) -> Parts:
        """Return the images of a request's document, then its context."""
        get_images = location[0]
        visuals = get_images(self._find_document(location)) if get_images else []
        images = [ImageRef(data=encode_png(v.convert("RGB"))) for v in _flatten(visuals)]
        return (*images, context)


def _flatten(values: Any) -> Iterable[Any]:
    """Yield the values in nested lists and tuples in order, or a single value; None is skipped."""
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flatten(value)
    elif values is not None:
        yield values


def truncate_at_stop(text: str, until: str | Sequence[str]) -> str:
    """Return the text before the first occurrence of a stop string; empty stops do not count."""
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.split(stop, maxsplit=1)[0]
    return text
