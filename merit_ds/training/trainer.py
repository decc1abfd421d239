# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, evaluation, checkpoints, and a clean way out."""

import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from merit_ds.telemetry.sampler import make_telemetry
from merit_ds.training.agreement import Agreement, agree, from_rank_zero, together
from merit_ds.training.checkpoint import save_checkpoint
from merit_ds.training.config import padded_vocab
from merit_ds.training.continuing import continue_run, data_order, model_settings
from merit_ds.training.dataset import micro_batches
from merit_ds.training.deepspeed_config import MONITORS
from merit_ds.training.evaluation import validation_loss
from merit_ds.training.gauss_newton import GaussNewton
from merit_ds.training.guard.judge import LEAVING
from merit_ds.training.interrupt import BadSteps, Interrupt
from merit_ds.training.interval import Interval
from merit_ds.training.model import masked_mean
from merit_ds.training.pace import Pace
from merit_ds.training.plan import Plan
from merit_ds.training.report import RunFolder, StepReport, add_row, draw_losses, flops_per_sequence
from merit_ds.training.sample import sample_text
from merit_ds.training.setup import Data
from merit_ds.training.watch import Watch


class Trainer:
    """One run, from its first step here to its last.

    Every method is a collective: all ranks call it.
    """

    def __init__(self, engine: Any, plan: Plan, data: Data, watch: Watch) -> None:
        self.engine = engine
        self.plan = plan
        self.data = data
        self.watch = watch
        self.step = 0
        """Optimizer steps done, those of the runs that this one continues included."""
        self._bad_steps = BadSteps(plan.config.run.max_bad_steps)
        self._interval = Interval(plan.device)
        self._pace = Pace(plan.device)
        self._saved_step = 0
        self._damaged: set[Path] = set()
        self._first_step = 1
        self._doubtful = False
        self._signal = 0
        self._learning_rate = 0.0
        save = plan.config.run.save
        self._folder = RunFolder(Path(save)) if save else None
        self._gauss_newton = GaussNewton(engine, plan, data)
        record = None if self._folder is None else partial(add_row, self._folder.telemetry)
        self.telemetry = make_telemetry(engine, plan, record=record)
        """None where no step is sampled."""

    def resume(self) -> None:
        """Continue from `run.load`, or begin. With `run.load` equal to `run.save` the first start finds nothing there,
        so one command serves a job that is started again and again, also on another number of ranks.

        Raises:
            InputError: nothing to continue from in another folder, another run's data order, or a `run.save` that
                cannot be written or is not the same folder for every rank.
        """
        plan, run = self.plan, self.plan.config.run
        self.watch.at("loading a checkpoint", slow=True)
        if run.load:
            self.step = continue_run(self.engine, plan, self.data, self.watch, say=self._say, damaged=self._damaged)
            self._saved_step, self._first_step = self.step, self.step + 1
        if self._folder is not None:
            folder, failing = self._folder, f"cannot begin the run in {run.save}"
            description = {"config": plan.config.model_dump(), "deepspeed": plan.ds_config}
            text = from_rank_zero(lambda: folder.begin(description, step=self.step), failing=failing)
            together(lambda: folder.check_shared(text), failing=failing)

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
                signum = self.train_step(interrupt)
                if signum:
                    self._save()
                    kept = f"continue with --load {run.save}" if self._saved_step else "there is no checkpoint"
                    name = signal.Signals(signum).name
                    self._say(f"{name}: stopped after step {self.step}, saved step {self._saved_step}: {kept}")
                    return
                last = self.step == self.plan.steps
                if self.step % run.log_interval == 0 or last or self._bad_steps.in_a_row:
                    self._log()
                self._bad_steps.check(self.step)
                # Before the checkpoint: a run that is killed between them does both again, and loses neither.
                if self.step % run.eval_interval == 0 or last:
                    self._evaluate()
                if self.step % run.save_interval == 0 or last:
                    self._save()

    def close(self) -> None:
        """Write the curve and the sample, and say where everything lies."""
        self.watch.at("ending the run", slow=True)
        if self._folder is not None:
            folder, curve = self._folder, self._folder.path / "loss.png"
            title = Path(self.plan.config.run.deepspeed).stem
            from_rank_zero(lambda: draw_losses(folder.rows(), curve, title=title), failing=f"cannot draw {curve}")
            self._say(f"loss curve       {curve}\nmetrics          {folder.metrics}")
            if folder.telemetry.exists():
                self._say(f"telemetry        {folder.telemetry}: python -m merit_ds.telemetry {folder.path} draws it")
            if self._saved_step:
                self._say(f"checkpoint       step {self._saved_step}, named in {folder.path / 'latest'}")
            for name in MONITORS:
                monitor = self.plan.ds_config.get(name, {})
                if monitor.get("enabled"):
                    self._say(f"{name:<16} {Path(monitor['output_path']) / monitor.get('job_name', '')}")
        if self.step == self.plan.steps and self.plan.config.run.sample_tokens:
            self._sample()
        dist.barrier()
        self.watch.at(LEAVING)
        self.engine.destroy()
        dist.destroy_process_group()

    def train_step(self, interrupt: Interrupt) -> int:
        """One optimizer step; or, once any rank has received a signal, its number and no step.

        A large batch's step is longer than the 30 seconds that DeepSpeed's launcher leaves after a signal, so the
        ranks look for one in the micro-batches too. Gradients accumulated so far are lost with the process.
        """
        if self._signal:
            return self._signal
        start = time.perf_counter()
        # Nothing here draws random numbers; whatever may one day, draws the same after a restart.
        torch.manual_seed(self.plan.config.run.seed + self.step)
        self.watch.at(f"beginning step {self.step + 1}", slow=True)  # Sophia's Hessian may be due
        self._gauss_newton.before_step(self.step)
        skipped_before = self.engine.skipped_steps
        self._learning_rate = self.engine.get_lr()[0]  # step() sets the next one
        if self.telemetry is not None:
            self.telemetry.before_step(self.step + 1)
        loss = self._accumulate(interrupt)
        if loss is None:
            return self._signal
        self.step += 1
        self.watch.at(f"ending step {self.step}")
        if self.telemetry is not None:
            self.telemetry.after_step(self.step, samples=self.step * self.plan.batch.global_batch)
        flags = [int(not loss.isfinite()), int(self.engine.skipped_steps > skipped_before), interrupt.received]
        *bad, self._signal = agree(flags, device=self.plan.device)
        non_finite, skipped = map(bool, bad)
        self._doubtful = non_finite
        self._interval.add(loss, time.perf_counter() - start, non_finite=non_finite, skipped=skipped)
        self._bad_steps.record(non_finite=non_finite, skipped=skipped)
        if slow := self._pace.end(self.step):
            self._say(slow)
        return 0

    def _accumulate(self, interrupt: Interrupt) -> torch.Tensor | None:
        """The micro-batches of one step, forward and backward, and at the last the optimizer.

        Returns:
            Their mean loss; None where any rank received a signal, and the step is not done.
        """
        batch, device, step = self.plan.batch, self.plan.device, self.step + 1
        slow = step == self._first_step  # kernels are compiled in it
        micro_steps = micro_batches(
            self.data.train,
            start=self.step * batch.global_batch,
            stop=step * batch.global_batch,
            micro_batch=batch.micro_batch,
            rank=parallel_state.get_data_parallel_rank(),
            world=parallel_state.get_data_parallel_world_size(),
        )
        loss = torch.zeros((), device=device)
        signals: Agreement | None = None
        self.watch.at(f"reading the data of step {step}")
        self._pace.begin()
        for index, samples in enumerate(micro_steps, start=1):
            if signals is not None:
                self._signal = signals.result()[0]
                if self._signal:
                    return None
            # Read a micro-batch later: to wait for the slowest rank in each would add up all their delays.
            last = index == batch.accumulation
            signals = None if last else Agreement([interrupt.received], device=device)
            samples = {key: value.to(device, non_blocking=True) for key, value in samples.items()}
            self.watch.at(f"in the forward pass of micro-batch {index} of step {step}", slow=slow)
            with self._pace.forward(first=index == 1):
                per_token = self.engine(samples["tokens"], samples["position_ids"], None, labels=samples["labels"])
            micro_loss = masked_mean(per_token, samples["loss_mask"])
            self.watch.at(f"in the backward pass of micro-batch {index} of step {step}", slow=slow)
            self.engine.backward(micro_loss)
            self.watch.at(f"{'in the optimizer' if last else 'between the micro-batches'} of step {step}", slow=slow)
            self.engine.step()
            loss += micro_loss.detach() / batch.accumulation
        return loss

    def _log(self) -> None:
        plan, model = self.plan, self.plan.config.model
        steps, seconds, loss = self._interval.take()
        rows = padded_vocab(self.data.tokenizer.vocab_size, multiple=model.vocab_multiple)
        sequences_per_second = plan.batch.global_batch * steps / seconds
        report = StepReport(
            iteration=self.step,
            consumed_samples=self.step * plan.batch.global_batch,
            seconds=seconds / steps,
            tflops_per_gpu=sequences_per_second / plan.world * flops_per_sequence(model, vocab_rows=rows) / 1e12,
            learning_rate=self._learning_rate,
            global_batch_size=plan.batch.global_batch,
            loss=loss,
            loss_scale=float(getattr(self.engine.optimizer, "loss_scale", 1.0)),
            grad_norm=float(self.engine.get_global_grad_norm() or 0.0),
            skipped=self._interval.skipped,
            nan=self._interval.non_finite,
            tokens_per_second=sequences_per_second * model.seq_length,
        )
        self._record(asdict(report))
        self._say(report.line(steps=plan.steps))
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events(report.events())

    def _evaluate(self) -> None:
        plan = self.plan
        self.watch.at(f"measuring the validation loss after step {self.step}")
        loss = validation_loss(
            self.engine.module,
            self.data.valid,
            sequences=plan.config.run.eval_sequences,
            micro_batch=plan.batch.micro_batch,
            device=plan.device,
            progress=self.watch.pulse,
        )
        self._record({"iteration": self.step, "valid_loss": loss})
        self._say(f" validation loss at iteration {self.step} | lm loss value: {loss:.6E} |")
        if self.engine.monitor.enabled:
            samples = self.step * plan.batch.global_batch
            self.engine.monitor.write_events([("Valid/Samples/loss", loss, samples)])

    def _save(self) -> None:
        """Save a checkpoint, unless this step's is there already or the weights are in doubt.

        A step that DeepSpeed skipped leaves them as they were; a loss that is not finite, or a weight, does not.
        """
        run = self.plan.config.run
        if not run.save or self._saved_step == self.step:
            return
        self.watch.at(f"saving the checkpoint of step {self.step}", slow=True)
        spoilt = self._doubtful or any(not weight.isfinite().all() for weight in self.engine.module.parameters())
        if agree([int(spoilt)], device=self.plan.device)[0]:
            self._say(f" no checkpoint of step {self.step}: the loss or a weight is not finite")
            return
        start = time.perf_counter()
        path = save_checkpoint(
            self.engine,
            Path(run.save),
            step=self.step,
            model=model_settings(self.plan, self.data),
            client_state={"step": self.step, "ranks": self.plan.world, "order": data_order(self.plan, self.data)},
            keep=run.keep_checkpoints,
            damaged=self._damaged,
        )
        self._saved_step = self.step
        self._say(f" saved checkpoint {path} in {time.perf_counter() - start:.1f} s")

    def _sample(self) -> None:
        """Show sample text, drawn by the ranks that share rank 0's layers."""
        run, text = self.plan.config.run, ""
        if parallel_state.get_data_parallel_rank() == 0:
            text = sample_text(
                self.engine.module,
                self.data.tokenizer,
                prompt=run.sample_prompt,
                tokens=run.sample_tokens,
                seq_length=self.plan.config.model.seq_length,
                device=self.plan.device,
            )
        if self._folder is not None:
            path = self._folder.path / "sample.txt"
            from_rank_zero(lambda: path.write_text(text + "\n", encoding="utf-8"), failing="cannot write the sample")
            self._say(f"sample           {path}")
        self._say(f"\n{text}\n")

    def _record(self, row: dict[str, Any]) -> None:
        if self._folder is not None and self.plan.rank == 0:
            self._folder.add(row)

    def _say(self, text: str) -> None:
        if self.plan.rank == 0:
            print(text, flush=True)
