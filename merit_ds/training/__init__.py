# SPDX-License-Identifier: Apache-2.0
"""The trainer: config, data, model, loop, checkpoints. It imports the optimizer's side, never the reverse."""

import warnings

# Said on import and at construction, by each rank, of choices that this trainer makes on purpose or has no part in.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",  # Megatron-core's own default
    "`torch.distributed.all_gather_into_tensor` is deprecated",  # called by DeepSpeed
):
    warnings.filterwarnings("ignore", message=_message)
