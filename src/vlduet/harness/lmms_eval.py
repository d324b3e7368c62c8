"""A model in lmms-eval: `python -m lmms_eval --model vlduet --model_args pretrained=DIR --tasks ...`.

Found by the entry point of the group `lmms_eval.models`; a "simple" model there: the images come first, then the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vlduet.data import images
from vlduet.data.records import ImageRef, Parts
from vlduet.errors import MissingExtraError
from vlduet.harness.builtin import answer_nlls, generate_answers, room_for_many_images
from vlduet.model.duet import DuetModel

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise MissingExtraError(
        "lmms-eval is not installed", fix="pip install 'vlduet[lmms]'"
    ) from error

DEFAULT_MAX_NEW_TOKENS = 128
"""max_new_tokens where a task names none."""
MAX_REQUESTS_IN_MEMORY = 256
"""Requests whose images are in memory at a time."""


def manifest() -> Any:
    """What lmms-eval registers."""
    return ModelManifest(model_id="vlduet", simple_class_path=f"{__name__}.LmmsModel")


class LmmsModel(lmms):  # type: ignore[misc]
    """The model that lmms-eval calls.

    Args:
        pretrained: the model's folder.
        system: a system message before every question.
        batch_size, device: named by lmms-eval; ours are batched by length, and `device` is where the model goes.
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
        self.model, self.system = DuetModel.from_pretrained(pretrained, device=device), system
        room_for_many_images(self.model)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, each cut where the task's `until` first occurs."""
        found = [""] * len(requests)
        asked: dict[int, list[int]] = {}
        for n, request in enumerate(requests):
            asked.setdefault(
                int(request.args[1].get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)), []
            ).append(n)
        groups = [
            (longest, m[at : at + MAX_REQUESTS_IN_MEMORY])
            for longest, m in asked.items()
            for at in range(0, len(m), MAX_REQUESTS_IN_MEMORY)
        ]
        for longest, members in groups:
            prompts = [self._prompt(requests[n].args[0], requests[n].args[2:]) for n in members]
            for n, text in zip(
                members,
                generate_answers(self.model, prompts, longest, system=self.system),
                strict=True,
            ):
                found[n] = truncate_at_stop(text, requests[n].args[1].get("until") or ())
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log probability of the continuation as the answer, False): whether it is the greedy one is not computed."""
        found = []
        for at in range(0, len(requests), MAX_REQUESTS_IN_MEMORY):
            pairs = []
            for request in requests[at : at + MAX_REQUESTS_IN_MEMORY]:
                context, target, *where = request.args
                text = target if isinstance(target, str) else target(self._document(where))
                pairs.append((self._prompt(context, where), text))
            found += [
                (-nats, False) for nats, _ in answer_nlls(self.model, pairs, system=self.system)
            ]
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: conversations that the task continues."""
        raise NotImplementedError(
            "vlduet answers one round; choose tasks of the type generate_until"
        )

    def _document(self, where: Sequence[Any]) -> Any:
        _, number, task, split = where
        return self.task_dict[task][split][number]

    def _prompt(self, context: str, where: Sequence[Any]) -> Parts:
        """The document's images, then the context."""
        visuals = where[0](self._document(where)) if where[0] else []
        pictures = tuple(ImageRef(data=images.encode_png(v.convert("RGB"))) for v in _flat(visuals))
        return (*pictures, context)


def _flat(values: Any) -> Iterable[Any]:
    """Images out of lists of lists."""
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    elif values is not None:
        yield values


def truncate_at_stop(text: str, until: str | Sequence[str]) -> str:
    """The text before the first of these marks."""
    for mark in [until] if isinstance(until, str) else until:
        if mark:
            text = text.split(mark, maxsplit=1)[0]
    return text
