# SPDX-License-Identifier: Apache-2.0
"""A small study for the tests of the laboratory's rules, in which no trainer is started."""

from merit_ds.lab.points import Cell
from merit_ds.lab.study import load_study

RECIPE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 32}
data: {prefix: data, tokenizer: byte}
run: {deepspeed: tiny.json, train_tokens: 1, sample_tokens: 9}
"""
STUDY = """
base: tiny.yaml
tokens: 81_920
micro_batch: 16
set: {model.num_layers: 3}
deepspeed: {zero_optimization: {stage: 1}}
optimizers:
  AdamW: {type: AdamW, params: {eps: 1e-8}}
  MERIT: {type: Merit}
  MERIT without clip: {type: Merit, params: {clip: null}, lr_of: MERIT}
grids:
  - {name: coarse, optimizer: [AdamW, MERIT], batch: [8, 48], lr: {AdamW: [1e-3, 2e-3, 4e-3], MERIT: {
      from: 1e-2, to: 4e-2, factor: 2}}}
  - {name: seeds, optimizer: [AdamW, MERIT], batch: [8, 48], seed: [1, 2, 3], lr: best}
  - {name: ablations, optimizer: [MERIT without clip], batch: [8], seed: [1, 2], lr: best}
"""
ADAMW, MERIT = Cell("AdamW", "default", 8, 81920), Cell("MERIT", "default", 8, 81920)


def loader(folder):
    """A function from changes, old text -> new text, to the study that they make of STUDY."""
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "tiny.json").write_text(
        '{"zero_optimization": {"stage": 2}, "tensorboard": {"enabled": true},'
        ' "optimizer": {"type": "Merit", "params": {"lr": 1}},'
        ' "gradient_clipping": 0.5}'
    )

    def load_changed(changes=None):
        text = STUDY
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        (folder / "study.yaml").write_text(text)
        return load_study(folder / "study.yaml")

    return load_changed


def ids(expansion):
    return [point.id for point in expansion.points]
