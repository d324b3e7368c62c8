"""The training loop, from top to bottom.

1. set up        config -> model, recipe, data, optimizer; or the state of an interrupted run
2. each step     now and then validate and save; then batches, one forward pass, two readings,
                 losses, backward pass, optimizer, log
3. finish        validate and save the model
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from vlduet import distributed
from vlduet.config import RunConfig, save_run_config
from vlduet.locks import lock_folder
from vlduet.logs import MetricsLog, ProgressBar, logger
from vlduet.model.score_statistics import ScoreStatistics
from vlduet.train.cache_size import limit_feature_cache
from vlduet.train.checkpointing import (
    ResumeMode,
    build_provenance,
    load_state,
    save_state,
    select_resumption,
    stop_not_finite,
)
from vlduet.train.loader import iterate_batches
from vlduet.train.run import TrainableModel, TrainingRun
from vlduet.train.setup import prepare_run
from vlduet.train.source_check import (
    check_sources,
    describe_data,
    describe_length,
    describe_risks,
)
from vlduet.train.step import all_finite, forward_backward, optimizer_step, seed_step

Evaluator = Callable[[TrainableModel], dict[str, float]]
"""Function that measures the model on validation records and returns numbers by name."""
Calibrator = Callable[[TrainableModel], ScoreStatistics | None]
"""Function that returns the scores of unrelated validation records, which are saved."""


def train(
    config: RunConfig,
    *,
    evaluate: Evaluator | None = None,
    calibrate: Calibrator | None = None,
    resume: ResumeMode = False,
) -> Path:
    """Train a model and write it, with everything about the run, into the folder `config.out`.

    Its content is config.yaml, metrics.jsonl, ``state/`` (every `train.save_every` steps), at the
    end ``model/``, and where needed quarantine.jsonl (dropped records, whose number is logged at
    the end) and features. Progress is shown or logged. Under torchrun every process must call it
    and joins the process group; rank 0 writes. Torch's global seed is set.

    Args:
        config: settings of the run (`vlduet.config.RunConfig`).
        evaluate: called on rank 0 before every step that `train.eval_every` divides (0 is one) and
            at the end; its numbers go to the metrics as `validation/NAME`. None: no validation.
        calibrate: called on rank 0 at the end; its result is saved with the model, as
            `score_statistics`. None: the model has no such statistics.
        resume: continue from the last saved state. All losses then equal, bit for bit, those of a
            run that was never interrupted. A finished run is only validated and saved again. With
            "auto", start if the folder has no saved state, and continue otherwise.

    Returns:
        The folder of the trained model, `out/model`.

    Raises:
        LockError: another process trains in this folder.
        ConfigError, DataError, ModelError: the config, the data or the model is unusable; before
            training, but for what the layout of a later record or a frozen encoder raises.
        TrainingError: the folder holds a run and `resume` is False, there is no state that fits, or
            a loss or gradient became infinite or NaN (`stop_not_finite`).
    """
    distributed.init_process_group()
    with ExitStack() as stack:
        distributed.call_on_main(lambda: stack.enter_context(lock_folder(config.out)))
        return _train(config, evaluate, calibrate, resume)


def _train(
    config: RunConfig, evaluate: Evaluator | None, calibrate: Calibrator | None, resume: ResumeMode
) -> Path:
    """Train as `train` does, in the process group and with the locked folder."""
    # ---------------------------------------------------------------- set up
    run, first_step = _start_run(config, resume)
    out = config.out
    metrics = MetricsLog(out, resume_at=first_step) if distributed.is_main_process() else None
    start_time = time.monotonic()
    settings = config.train
    batches_of_steps = iterate_batches(run, first_step)
    distributed.barrier()

    with ProgressBar(total=run.num_steps - first_step, label="train") as progress_bar:
        for step in range(first_step, run.num_steps):
            # -------------------------------------------------------- now and then
            if evaluate and step % settings.eval_every == 0:
                _validate(run, evaluate, metrics, step=step, start_time=start_time)
            is_save_step = step > first_step and step % settings.save_every == 0
            if is_save_step and distributed.is_main_process():
                save_state(run, step)

            # -------------------------------------------------------- one step
            run.model.train()
            seed_step(config.seed, step)
            samples, batches = next(batches_of_steps)
            values = forward_backward(run, batches)
            if not all_finite(values):
                stop_not_finite(run, samples, step, values=values)
            optimizer_step(run, step)

            # -------------------------------------------------------- log
            progress_bar.advance(
                note=f"loss {values['loss']:.3f}" if "loss" in values else "no loss"
            )
            is_log_step = step % settings.log_every == 0 or step == run.num_steps - 1
            if metrics and is_log_step:
                tokens = sum(batch.num_tokens for batch in batches)
                seconds = time.monotonic() - start_time
                metrics.write(step, {**values, "tokens": tokens, "seconds": seconds})

    # ---------------------------------------------------------------- finish
    if evaluate:
        _validate(run, evaluate, metrics, step=run.num_steps, start_time=start_time)
    distributed.barrier()
    if distributed.is_main_process():
        _save_results(run, calibrate)
    if metrics:
        metrics.close()
    distributed.barrier()
    return out / "model"


def _start_run(config: RunConfig, resume: ResumeMode) -> tuple[TrainingRun, int]:
    """Set torch's seed, open the run, and write its config on rank 0.

    What it trains on is logged, with warnings of what its records cannot give. Rank 0 replaces
    config.yaml, and saves the state of step 0 if the run is not resumed.

    Returns:
        The run and its first step: 0, or the step of the state that was loaded.

    Raises:
        TrainingError: as `select_resumption` (before anything is opened); or there is no state, or
            a broken one or one of other settings.
        ConfigError, DataError, ModelError: as `prepare_run` and `check_sources`.
    """
    torch.manual_seed(config.seed)
    is_resumed = distributed.call_on_main(lambda: select_resumption(config.out, resume))
    run = prepare_run(config, resume=is_resumed)
    check = check_sources(run)
    first_step = load_state(run) if is_resumed else 0
    logger.info(describe_data(run, check))
    for risk in describe_risks(run, check):
        logger.warning(f"warning: {risk}")
    limit_feature_cache(run)
    if distributed.is_main_process():
        save_run_config(config, config.out / "config.yaml", comment=describe_length(run))
        if not is_resumed:
            save_state(run, 0)
    return run, first_step


def _save_results(run: TrainingRun, calibrate: Calibrator | None) -> None:
    """Write the last state and the model, with statistics of its scores; log the dropped records.

    The state comes first, so that no step is lost if what follows fails.
    """
    save_state(run, run.num_steps)
    run.model.score_statistics = calibrate(run.model) if calibrate else None
    run.model.save_pretrained(run.config.out / "model", provenance=build_provenance(run))
    if run.quarantine.count:
        logger.info(str(run.quarantine))


def _validate(
    run: TrainingRun,
    evaluate: Evaluator,
    metrics: MetricsLog | None,
    *,
    step: int,
    start_time: float,
) -> None:
    """Evaluate the model and append a row with `validation/NAME` and `seconds` to the metrics.

    `seconds` counts from `start_time` (`time.monotonic`). With metrics None, as on all ranks but 0,
    nothing happens.
    """
    if not metrics:
        return
    values = {f"validation/{name}": value for name, value in evaluate(run.model).items()}
    metrics.write(step, {**values, "seconds": time.monotonic() - start_time})
