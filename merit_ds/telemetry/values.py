# SPDX-License-Identifier: Apache-2.0
"""The values by name: the keys of a row of telemetry.jsonl, and what `telemetry.values` in a recipe may list."""

VALUES = {
    "max_attention_logit": "by layer, the largest q.k * scale over a query and the keys up to it",
    "attention_entropy": "by layer, the mean entropy of the attention weights, in nats",
    "ratios": "by parameter, minimum, mean and maximum of the trust ratio s over its elements",
    "clipped_share": "by parameter, the share of elements whose scaled update |s * u| reaches the clip",
    "whole_share": "by matrix parameter, the share of elements whose ratio is that of the whole weight",
    "l2_max_gap": "of W_Q and W_K, (l2 norm - max norm) / l2 norm",
    "row_similarity": "by matrix, the correlation of |w| between two elements of the same row",
    "col_similarity": "by matrix, the correlation of |w| between two elements of the same column",
    "output_operator_norm": "of the output layer, the operator norm from RMS to infinity",
}

OF_ATTENTION = frozenset({"max_attention_logit", "attention_entropy"})
OF_UPDATES = frozenset({"ratios", "clipped_share", "whole_share"})
OF_WEIGHTS = frozenset(VALUES) - OF_ATTENTION - OF_UPDATES
