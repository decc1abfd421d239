# SPDX-License-Identifier: Apache-2.0
"""The quickstart under DeepSpeed's launcher, on two and three hosts: bit for bit what one makes of it."""

import job
import pytest
from launch import assert_same_run, losses

STEPS = 4


@pytest.mark.parametrize(("ranks", "batch", "micro_batch"), [(2, 32, 16), (3, 24, 4)])
def test_hosts_train_as_the_ranks_of_one_machine_do(hosts, folder, ranks, batch, micro_batch):
    job.write_recipe(folder, steps=STEPS, batch=batch, micro_batch=micro_batch)
    outputs = {}
    for name, local in (("local", True), ("cluster", False)):
        process = job.start(hosts, folder, "--save", f"{name}{ranks}", ranks=ranks, local=local)
        outputs[name] = job.finish(process)
        assert process.returncode == 0, outputs[name]
    assert f"h{ranks - 1}: " in outputs["cluster"] and "h1: " not in outputs["local"]
    assert sorted(losses(folder / f"cluster{ranks}")) == list(range(1, STEPS + 1))
    assert_same_run(folder / f"cluster{ranks}", folder / f"local{ranks}")
