# SPDX-License-Identifier: Apache-2.0
"""The large-batch laboratory: a study is a grid of training runs, and a report of what came out.

python -m merit_ds.lab run STUDY.yaml --data PREFIX --output DIR
python -m merit_ds.lab status DIR
python -m merit_ds.lab report DIR
"""
