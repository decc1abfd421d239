# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, evaluation, checkpoints, and a clean way out."""

import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from merit_ds.errors import InputError
from merit_ds.training.agreement import agree
from merit_ds.training.checkpoint import holds_checkpoints, load_checkpoint, save_checkpoint
from merit_ds.training.data_manifest import read_manifest
from merit_ds.training.dataset import Sequences, micro_batches
from merit_ds.training.deepspeed_config import MONITORS
from merit_ds.training.evaluation import validation_loss
from merit_ds.training.interrupt import BadSteps, Interrupt
from merit_ds.training.model import masked_mean, padded_vocab
from merit_ds.training.report import RunFolder, StepReport, draw_losses, flops_per_sequence
from merit_ds.training.sample import sample_text
from merit_ds.training.setup import Plan


class Trainer:
    """One run, from its first step here to its last.

    Every method is a collective: all ranks call it.
    """

    def __init__(self, engine: Any, plan: Plan, datasets: tuple[Sequences, Sequences]) -> None:
        self.engine = engine
        self.plan = plan
        self.train_data, self.valid_data = datasets
        self.step = 0
        """Optimizer steps done, those of the runs that this one continues included."""
        self._bad_steps = BadSteps(plan.config.run.max_bad_steps)
        self._interval = _Interval(plan.device)
        self._saved_step = -1
        self._learning_rate = 0.0
        save = plan.config.run.save
        self._folder = RunFolder(Path(save)) if save and plan.rank == 0 else None

    def resume(self) -> None:
        """Continue from `run.load`, or begin. With `run.load` equal to `run.save` the first start finds nothing there,
        so one command serves a job that is started again and again.

        Raises:
            InputError: nothing to continue from in another folder, or `run.save` holds another run's checkpoints.
        """
        run = self.plan.config.run
        if run.save and run.save != run.load and holds_checkpoints(Path(run.save)):
            # A new run would remove the older one's checkpoints, as it keeps only its newest.
            raise InputError(f"{run.save} holds checkpoints: continue them with --load {run.save}, or --save elsewhere")
        if run.load:
            state = load_checkpoint(self.engine, Path(run.load), model=self._model_settings())
            if state is not None:
                self._check_order(state["order"])
                self.step = self._saved_step = state["step"]
                self._say(f"continuing from step {self.step} in {run.load}")
            elif run.load != run.save:
                raise InputError(f"{run.load}: no checkpoint there; check run.load, or leave it out to start anew")
        if self._folder:
            description = {"config": self.plan.config.model_dump(), "deepspeed": self.plan.ds_config}
            self._folder.begin(description, step=self.step)

    def train(self) -> None:
        """Steps until the token budget is spent, or a signal asks to stop; then the last checkpoint is written.

        Raises:
            InputError: too many bad steps in a row.
        """
        run = self.plan.config.run
        with Interrupt() as interrupt:
            if self.step == 0:
                self._evaluate()
            while self.step < self.plan.steps:
                signum = self._train_step(interrupt)
                if self.step % run.log_interval == 0:
                    self._log()
                if self.step % run.eval_interval == 0 or self.step == self.plan.steps:
                    self._evaluate()
                if signum or self.step % run.save_interval == 0 or self.step == self.plan.steps:
                    self._save()
                if signum:
                    self._say(f"{signal.Signals(signum).name}: stopped after step {self.step}; continue with --load")
                    return

    def close(self) -> None:
        """Write the curve and the sample, and say where everything lies."""
        done = self.step == self.plan.steps
        run, model = self.plan.config.run, self.plan.config.model
        if self._folder:
            curve = self._folder.path / "loss.png"
            draw_losses(self._folder.rows(), curve, title=Path(run.deepspeed).stem)
            self._say(f"loss curve       {curve}\nmetrics          {self._folder.metrics}")
            self._say(f"checkpoint       {(self._folder.path / 'latest')} names the newest")
            for name in MONITORS:
                monitor = self.plan.ds_config.get(name, {})
                if monitor.get("enabled"):
                    self._say(f"{name:<16} {Path(monitor['output_path']) / monitor.get('job_name', '')}")
        if done and run.sample_tokens and self.plan.rank == 0:
            text = sample_text(
                self.engine.module,
                self.plan.tokenizer,
                prompt=run.sample_prompt,
                tokens=run.sample_tokens,
                seq_length=model.seq_length,
                device=self.plan.device,
            )
            if self._folder:
                (self._folder.path / "sample.txt").write_text(text + "\n", encoding="utf-8")
                self._say(f"sample           {self._folder.path / 'sample.txt'}")
            self._say(f"\n{text}\n")
        dist.barrier()
        self.engine.destroy()
        dist.destroy_process_group()

    def _train_step(self, interrupt: Interrupt) -> int:
        """One optimizer step; returns the number of a signal that any rank received, else 0."""
        start = time.perf_counter()
        batch = self.plan.batch
        # Nothing here draws random numbers; whatever may one day, draws the same after a restart.
        torch.manual_seed(self.plan.config.run.seed + self.step)
        first = self.step * batch.global_batch
        loss = torch.zeros((), device=self.plan.device)
        micro_steps = micro_batches(
            self.train_data,
            start=first,
            stop=first + batch.global_batch,
            micro_batch=batch.micro_batch,
            rank=self.plan.rank,
            world=self.plan.world,
        )
        skipped_before = self.engine.skipped_steps
        self._learning_rate = self.engine.get_lr()[0]  # step() sets the next one
        for samples in micro_steps:
            samples = {key: value.to(self.plan.device, non_blocking=True) for key, value in samples.items()}
            per_token = self.engine(samples["tokens"], samples["position_ids"], None, labels=samples["labels"])
            micro_loss = masked_mean(per_token, samples["loss_mask"])
            self.engine.backward(micro_loss)
            self.engine.step()
            loss += micro_loss.detach() / batch.accumulation
        self.step += 1
        flags = [interrupt.received, int(not loss.isfinite()), int(self.engine.skipped_steps > skipped_before)]
        signum, non_finite, skipped = agree(flags, device=self.plan.device)
        self._interval.add(loss, time.perf_counter() - start, non_finite=bool(non_finite), skipped=bool(skipped))
        self._bad_steps.record(self.step, non_finite=bool(non_finite), skipped=bool(skipped))
        return signum

    def _log(self) -> None:
        plan, model = self.plan, self.plan.config.model
        steps, seconds, loss = self._interval.take()
        rows = padded_vocab(plan.tokenizer.vocab_size, multiple=model.vocab_multiple)
        sequences_per_second = plan.batch.global_batch * steps / seconds
        report = StepReport(
            iteration=self.step,
            consumed_samples=self.step * plan.batch.global_batch,
            seconds=seconds / steps,
            tflops_per_gpu=sequences_per_second / plan.world * flops_per_sequence(model, vocab_rows=rows) / 1e12,
            learning_rate=self._learning_rate,
            global_batch_size=plan.batch.global_batch,
            loss=loss,
            loss_scale=float(getattr(self.engine.optimizer, "cur_scale", 1.0)),
            grad_norm=float(self.engine.get_global_grad_norm() or 0.0),
            skipped=self._interval.skipped,
            nan=self._interval.non_finite,
            tokens_per_second=sequences_per_second * model.seq_length,
        )
        self._say(report.line(steps=plan.steps))
        if self._folder:
            self._folder.add_step(report)
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events(report.events())

    def _evaluate(self) -> None:
        plan = self.plan
        loss = validation_loss(
            self.engine.module,
            self.valid_data,
            sequences=plan.config.run.eval_sequences,
            micro_batch=plan.batch.micro_batch,
            device=plan.device,
        )
        self._say(f" validation loss at iteration {self.step} | lm loss value: {loss:.6E} |")
        if self._folder:
            self._folder.add({"iteration": self.step, "valid_loss": loss})
        if self.engine.monitor.enabled:
            samples = self.step * plan.batch.global_batch
            self.engine.monitor.write_events([("Valid/Samples/loss", loss, samples)])

    def _save(self) -> None:
        """Save a checkpoint, unless the weights are in doubt or this step's is there already."""
        run = self.plan.config.run
        if not run.save or self._bad_steps.in_a_row or self._saved_step == self.step:
            return
        spoilt = any(not parameter.isfinite().all() for parameter in self.engine.module.parameters())
        if agree([int(spoilt)], device=self.plan.device)[0]:
            self._say(f" no checkpoint of step {self.step}: the weights hold Inf or NaN")
            return
        start = time.perf_counter()
        path = save_checkpoint(
            self.engine,
            Path(run.save),
            step=self.step,
            model=self._model_settings(),
            client_state={"step": self.step, "order": self._order()},
            keep=run.keep_checkpoints,
        )
        self._saved_step = self.step
        self._say(f" saved checkpoint {path} in {time.perf_counter() - start:.1f} s")

    def _order(self) -> dict[str, Any]:
        """What decides which sequences a step takes."""
        return {
            "run.seed": self.plan.config.run.seed,
            "train_batch_size": self.plan.batch.global_batch,
            "the number of steps": self.plan.steps,
            "the training data's sha256": read_manifest(self.plan.config.data.prefix).split("train").bin.sha256,
        }

    def _check_order(self, saved: dict[str, Any]) -> None:
        for key, here in self._order().items():
            if saved[key] != here:
                raise InputError(
                    f"{self.plan.config.run.load}: {key} was {saved[key]} and is {here} in this run, so it would see "
                    "other sequences: continue with the same recipe and data"
                )

    def _model_settings(self) -> dict[str, Any]:
        """What a checkpoint fits: recomputation changes no result and is left out."""
        settings = self.plan.config.model.model_dump(exclude={"activation_checkpointing"})
        return settings | {"vocab_size": self.plan.tokenizer.vocab_size}

    def _say(self, text: str) -> None:
        if self.plan.rank == 0:
            print(text, flush=True)


class _Interval:
    """The steps since the last log line, and the bad ones since the start."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device)
        self._steps = 0
        self._seconds = 0.0
        self.skipped = 0
        self.non_finite = 0

    def add(self, loss: torch.Tensor, seconds: float, *, non_finite: bool, skipped: bool) -> None:
        self._loss += loss
        self._steps += 1
        self._seconds += seconds
        self.skipped += skipped
        self.non_finite += non_finite

    def take(self) -> tuple[int, float, float]:
        """Steps, seconds, and the mean loss over steps and ranks; starts a new interval. A collective."""
        mean = self._loss / self._steps
        dist.all_reduce(mean)
        result = self._steps, self._seconds, float(mean) / dist.get_world_size()
        self._loss.zero_()
        self._steps, self._seconds = 0, 0.0
        return result
