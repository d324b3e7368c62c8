"""The training loop, top to bottom.

1. set up        config -> model, recipe, data, optimiser; or the state of a run that was stopped
2. every step    once in a while: validate, save; then lay out, one forward, two readings, losses, backward, move, log
3. finish        validate, save the model
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlduet import __version__, config, distributed
from vlduet.config import RunConfig
from vlduet.data.record_json import record_to_json
from vlduet.data.stream import Sample
from vlduet.errors import TrainingError
from vlduet.logs import MetricsLog, ProgressBar, logger
from vlduet.train import checkpointing, setup
from vlduet.train.setup import TrainableModel, TrainingRun
from vlduet.train.step import all_finite, forward_backward, optimizer_step, seed_step

Evaluator = Callable[[TrainableModel], dict[str, float]]


def train(settings: RunConfig, *, evaluate: Evaluator | None = None, resume: bool = False) -> Path:
    """Train, and write everything about it into `settings.out`.

    Args:
        settings: see `vlduet.config.RunConfig`.
        evaluate: measures the model on validation records now and then; its numbers go to the metrics.
        resume: go on from the last state; losses continue bit for bit as if the run had never stopped.

    Returns:
        The folder of the trained model, `out/model`.

    Raises:
        ConfigError, DataError, ModelError: before training starts.
        TrainingError: a loss or gradient that is not a number (the batch is saved), or a state that does not fit.
    """
    # ---------------------------------------------------------------- set up
    distributed.init_process_group()
    torch.manual_seed(settings.seed)
    out = settings.out
    if distributed.is_main_process():
        out.mkdir(parents=True, exist_ok=True)
        if not resume and (out / checkpointing.STATE_FOLDER).exists():
            raise TrainingError(
                "this folder holds a run already", place=out, fix="Use --resume, or another out="
            )
    run = setup.prepare_run(settings)
    first = checkpointing.load_state(run) if resume else 0
    log = MetricsLog(out, resume_at=first) if distributed.is_main_process() else None
    if distributed.is_main_process():
        config.save_run_config(settings, out / "config.yaml")
        if not resume:
            checkpointing.save_state(run, 0)
    began = time.monotonic()
    steps, every = settings.train.steps, settings.train
    laid_out = setup.iterate_batches(run, first)
    distributed.barrier()

    with ProgressBar(total=steps - first, label="train") as bar:
        for step in range(first, steps):
            # -------------------------------------------------------- once in a while
            if evaluate and step % every.eval_every == 0:
                _validate(run, evaluate, log, step, began)
            if step > first and step % every.save_every == 0 and distributed.is_main_process():
                checkpointing.save_state(run, step)

            # -------------------------------------------------------- the step
            run.model.train()
            seed_step(settings.seed, step)
            samples, chunks = next(laid_out)
            measured = forward_backward(run, chunks)
            if not all_finite(measured):
                _stop(run, samples, step, measured)
            optimizer_step(run, step)

            # -------------------------------------------------------- log
            bar.advance(note=f"loss {measured['loss']:.3f}")
            if log and (step % every.log_every == 0 or step == steps - 1):
                tokens = sum(chunk.num_tokens for chunk in chunks)
                log.write(step, {**measured, "tokens": tokens, "seconds": time.monotonic() - began})

    # ---------------------------------------------------------------- finish
    if evaluate:
        _validate(run, evaluate, log, steps, began)
    distributed.barrier()
    if distributed.is_main_process():
        checkpointing.save_state(run, steps)
        run.model.save_pretrained(out / "model", provenance=build_provenance(settings))
        if run.quarantine.count:
            logger.info(str(run.quarantine))
    if log:
        log.close()
    distributed.barrier()
    return out / "model"


def _validate(
    run: TrainingRun, evaluate: Evaluator, log: MetricsLog | None, step: int, began: float
) -> None:
    """Measure on rank 0."""
    if not log:
        return
    values = evaluate(run.model)
    log.write(
        step,
        {f"validation/{name}": value for name, value in values.items()}
        | {"seconds": time.monotonic() - began},
    )


def _stop(run: TrainingRun, samples: list[Sample], step: int, measured: dict[str, float]) -> None:
    """Keep what is needed to find the cause, then stop; the model in memory has not moved."""
    folder = run.config.out / f"not-finite-{step}-rank{distributed.get_rank()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = [json.dumps(record_to_json(sample.record, root=folder)) for sample in samples]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "measured.json").write_text(json.dumps(measured, indent=1))
    if distributed.is_main_process():
        checkpointing.save_state(run, step)
    bad = ", ".join(name for name, value in measured.items() if not all_finite({name: value}))
    raise TrainingError(
        f"step {step}: {bad} is not a number",
        place=folder,
        fix="Its records are saved there: mend them and --resume, or start anew with a lower train.lr",
    )


def build_provenance(settings: RunConfig) -> dict[str, Any]:
    """What made a model: config and versions."""
    return {
        "config": settings.model_dump(mode="json"),
        "vlduet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
