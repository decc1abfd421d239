# SPDX-License-Identifier: Apache-2.0
"""The recipe's YAML: what is read, what wins, and one line for each mistake."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from merit_ds.errors import InputError
from merit_ds.training.config import Config, load_config, reference

RECIPE = """\
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}
data: {prefix: data/x, tokenizer: byte}
run: {deepspeed: ds.json, train_tokens: 1_000_000}
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The one line that a bad recipe gets."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides=list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_is_read_with_defaults_and_paths_beside_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert (config.model.seq_length, config.model.init_std, config.run.seed) == (1024, 0.02, 1234)
    assert config.run.train_tokens == 1_000_000
    assert Path(config.run.deepspeed) == tmp_path / "ds.json"
    assert config.data.prefix == "data/x"


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 2


def test_overrides_win_and_the_last_one_most(tmp_path: Path) -> None:
    overrides = ["run.seed=7", "run.seed=8", "model.activation_checkpointing=true", "run.deepspeed=here.json"]
    config = load_config(write(tmp_path), overrides=overrides)
    assert config.run.seed == 8
    assert config.model.activation_checkpointing is True
    assert config.run.deepspeed == "here.json"
    assert load_config(write(tmp_path), overrides=["run.save=null"]).run.save is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", r"unknown key 'model\.num_layer'; did you mean 'num_layers'"),
        ("modle.num_layers=3", "unknown key 'modle'; did you mean 'model'"),
        ("run.zzzzzz=3", r"unknown key 'run\.zzzzzz'; known here: deepspeed, train_tokens"),
        ("run.seed=seven", r"run\.seed: .*integer.*'seven'"),
        ("run.seed='7'", r"run\.seed: .*integer"),
        ("run.train_tokens=1.5", r"run\.train_tokens: .*integer.*1\.5"),
        ("model.num_layers=0", r"model\.num_layers: .*greater than 0"),
        ("model.num_attention_heads=5", "num_attention_heads 5 does not divide hidden_size 64"),
        ("model.tensor_parallel=3", "tensor_parallel 3 does not divide num_attention_heads 4"),
        ("model.tensor_parallel=0", r"model\.tensor_parallel: .*greater than 0"),
        ("model.ffn_hidden_size=0", r"model\.ffn_hidden_size: .*greater than 0"),
        ("model.norm=rms", r"model\.norm: .*'layernorm' or 'rmsnorm'"),
        ("model.activation=relu", r"model\.activation: .*'gelu' or 'swiglu'"),
        ("model.positions=rope", r"model\.positions: .*'learned' or 'rotary'"),
        ("model.qk_norm=1", r"model\.qk_norm: .*boolean"),
        ("model.sequence_parallel=true", "sequence_parallel needs tensor_parallel above 1"),
        ("model.activation_checkpointing=1", r"model\.activation_checkpointing: .*boolean"),
        ("data.tokenizer=bpe", r"data\.tokenizer: .*'gpt2' or 'byte'"),
        ("telemetry.values=[ratio]", r"telemetry\.values: no value 'ratio'; did you mean 'ratios'"),
        ("telemetry.values=[zzz]", r"telemetry\.values: no value 'zzz'; there are max_attention_logit"),
        ("telemetry.values=ratios", r"telemetry\.values: .*list.*'ratios'"),
        ("telemetry.interval=-1", r"telemetry\.interval: .*greater than or equal to 0"),
        ("run.seed", "write it as section.key=value"),
        ("seed=7", "write it as section.key=value"),
        ("run.seed=[1", "not valid YAML"),
    ],
)
def test_a_bad_value_gets_one_line_that_names_it(tmp_path: Path, override: str, message: str) -> None:
    assert re.search(message, refusal(write(tmp_path), override))


def test_a_sequence_that_does_not_split_is_refused(tmp_path: Path) -> None:
    split = ["model.tensor_parallel=4", "model.sequence_parallel=true"]
    assert load_config(write(tmp_path), overrides=split).model.tensor_parallel == 4
    message = refusal(write(tmp_path), *split, "model.seq_length=30")
    assert "tensor_parallel 4 does not divide seq_length 30, as sequence_parallel needs" in message


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    ffn = refusal(write(tmp_path), "model.tensor_parallel=2", "model.ffn_hidden_size=171")
    assert "tensor_parallel 2 does not divide ffn_hidden_size 171" in ffn
    odd = refusal(write(tmp_path), "model.hidden_size=60", "model.positions=rotary")
    assert "hidden_size / num_attention_heads must be even" in odd
    assert load_config(write(tmp_path), overrides=["model.hidden_size=60"]).model.ffn_width == 240


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe has the sections model, data, run"),
        ("- 1", "a recipe has the sections model, data, run"),
        ("model: {", "not valid YAML"),
        (RECIPE.replace(", train_tokens: 1_000_000", ""), r"key 'run\.train_tokens' is missing"),
        (RECIPE.replace("train_tokens", "train_token"), "did you mean 'train_tokens'"),
        (RECIPE.replace("data:", "date:"), "did you mean 'data'"),
        ("model: 3\n" + RECIPE.partition("\n")[2], "model: .*dictionary"),
    ],
)
def test_a_bad_file_gets_one_line_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    found = refusal(path)
    assert found.startswith(f"{path}: ") and re.search(message, found)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "cannot read the recipe: No such file" in refusal(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    assert "not UTF-8 at byte 7" in refusal(tmp_path / "latin.yaml")


def test_the_reference_has_every_key() -> None:
    table = reference()
    for name, section in Config.model_fields.items():
        for key in section.annotation.model_fields:
            assert f"`{name}.{key}`" in table


def test_the_readme_shows_the_reference() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert reference() in readme, "paste the output of `python -m merit_ds.training.config` into the README"
