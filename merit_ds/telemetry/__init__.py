# SPDX-License-Identifier: Apache-2.0
"""What a run looks like from inside, sampled every N steps: attention logits, trust ratios, clipping, weights.

    python -m merit_ds.telemetry RUN_FOLDER     # draws telemetry.jsonl

`values.py` says what each value is; `attention.py`, `updates.py` and `weights.py` measure them where they arise;
`sampler.py` does it in the trainer's step, and `plots.py` draws them. Measuring changes no bit of a run.
"""
