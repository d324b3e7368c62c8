"""The training loop, from top to bottom.

1. set up        config -> model, recipe, data, optimizer; or the state of an interrupted run
2. each step     now and then validate and save; then batches, one forward pass, two readings,
                 losses, backward pass, optimizer, log
3. finish        validate and save the model
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlduet import distributed
from vlduet.config import RunConfig, save_run_config
from vlduet.data.record_json import record_to_json
from vlduet.data.stream import Sample
from vlduet.errors import TrainingError
from vlduet.logs import MetricsLog, ProgressBar, logger
from vlduet.train.checkpointing import STATE_FOLDER, build_provenance, load_state, save_state
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


def train(config: RunConfig, *, evaluate: Evaluator | None = None, resume: bool = False) -> Path:
    """Train a model and write it, with everything about the run, into the folder `config.out`.

    Its content is config.yaml, metrics.jsonl, ``state/`` (every `train.save_every` steps), at the
    end ``model/``, and where needed quarantine.jsonl (dropped records, whose number is logged at
    the end) and features. Progress is shown or logged. Under torchrun every process must call it
    and joins the process group; rank 0 writes. Torch's global seed is set.

    Args:
        config: settings of the run (`vlduet.config.RunConfig`).
        evaluate: called on rank 0 before every step that `train.eval_every` divides (0 is one) and
            at the end; its numbers go to the metrics as `validation/NAME`. None: no validation.
        resume: continue from the last saved state. All losses then equal, bit for bit, those of a
            run that was never interrupted. A finished run is only validated and saved again.

    Returns:
        The folder of the trained model, `out/model`.

    Raises:
        ConfigError, DataError, ModelError: the config, the data or the model is unusable; before
            training, but for what the layout of a later record or a frozen encoder raises.
        TrainingError: the folder holds a run and `resume` is False, there is no state that fits, or
            a loss or gradient became infinite or NaN (`_stop_not_finite`).
    """
    # ---------------------------------------------------------------- set up
    run, first_step = _start_run(config, resume=resume)
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
                _stop_not_finite(run, samples, step, values)
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
        save_state(run, run.num_steps)
        run.model.save_pretrained(out / "model", provenance=build_provenance(run))
        if run.quarantine.count:
            logger.info(str(run.quarantine))
    if metrics:
        metrics.close()
    distributed.barrier()
    return out / "model"


def _start_run(config: RunConfig, *, resume: bool) -> tuple[TrainingRun, int]:
    """Join the process group, set torch's seed, open the run, and write its config on rank 0.

    What it trains on is logged, with warnings of what its records cannot give. Rank 0 creates the
    folder `out`, replaces config.yaml, and without `resume` saves the state of step 0.

    Returns:
        The run and its first step: 0, or with `resume` the step of the state that was loaded.

    Raises:
        TrainingError: `resume` is False and ``out/state`` exists (before anything is opened), or
            `resume` is True and there is no state, or a broken one or one of other settings.
        ConfigError, DataError, ModelError: as `prepare_run` and `check_sources`.
    """
    distributed.init_process_group()
    torch.manual_seed(config.seed)
    out = config.out
    if distributed.is_main_process():
        out.mkdir(parents=True, exist_ok=True)
        if not resume and (out / STATE_FOLDER).exists():
            raise TrainingError(
                "this folder holds a run already", place=out, fix="Use --resume, or another out="
            )
    run = prepare_run(config, resume=resume)
    check = check_sources(run)
    first_step = load_state(run) if resume else 0
    logger.info(describe_data(run, check))
    for risk in describe_risks(run, check):
        logger.warning(f"warning: {risk}")
    if distributed.is_main_process():
        save_run_config(config, out / "config.yaml", comment=describe_length(run))
        if not resume:
            save_state(run, 0)
    return run, first_step


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


def _stop_not_finite(
    run: TrainingRun, samples: list[Sample], step: int, values: dict[str, float]
) -> None:
    """Save the records and values of a step with an infinite or NaN value, and the state before it.

    Every rank writes records.jsonl and measured.json into the folder ``not-finite-STEP-rankRANK``
    of `out`, replacing an earlier one; rank 0 also saves the run's state, to resume at this step.

    Raises:
        TrainingError: always; it names the values and the folder.
    """
    folder = run.config.out / f"not-finite-{step}-rank{distributed.get_rank()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = [json.dumps(record_to_json(sample.record, root=folder)) for sample in samples]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "measured.json").write_text(json.dumps(values, indent=1))
    if distributed.is_main_process():
        save_state(run, step)
    names = [name for name, value in values.items() if not all_finite({name: value})]
    raise TrainingError(
        f"step {step}: {', '.join(names)} is not a number",
        place=folder,
        fix="Its records are saved there: correct them and --resume, "
        "or start anew with a lower train.lr",
    )
