# make train   pre-train a small GPT with Merit under ZeRO-2 on this machine, from real text to sample text
# make test    everything that is checked before a change lands
# make test-full   that, and the tests marked full, with every cell of docs/sharding.md, which it writes anew
# make test-cluster  several hosts, made of namespaces by root: the launcher over ssh, and what may break
# make test-docker   as root: builds the CPU image and trains in its containers on two hosts (docs/containers.md)
# make soak    kills a job on two hosts at random moments until it has gone on 50 times, half an hour
# make test-gpu    where there is a GPU: the CUDA kernels against the formula, and how near they are to the memory's limit
# RANKS=1 make train, PYTHON=python3.12 make test, ... change the defaults below.
PYTHON ?= python3
RANKS ?= 2

VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# DeepSpeed compiles an operation on its first use: into the project's own folder, so that no other project's lock or
# compiler can get in the way.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/$(VENV)/inductor
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
export DS_ACCELERATOR := cpu
endif

.PHONY: train test test-full test-cluster test-docker soak test-gpu lint clean

train: $(VENV)/ready data/wiki.json
	deepspeed --num_gpus $(RANKS) pretrain_gpt.py --config configs/quickstart.yaml --load runs/quickstart

test: $(VENV)/ready lint
	python -m pytest

test-gpu: $(VENV)/ready
	python -m merit_ds.doctor --build
	python -m pytest tests/gpu
	python benchmarks/optimizer_step.py --device cuda --rounds 50

test-full: $(VENV)/ready lint
	python -m pytest -m "not cluster"

test-cluster: $(VENV)/ready
	python -m pytest -m cluster tests/cluster

test-docker: $(VENV)/ready data/wiki.json
	PYTHONPATH=tests python tests/cluster/containers.py

soak: $(VENV)/ready
	python tests/cluster/soak.py --kills 50

lint: $(VENV)/ready
	ruff check
	ruff format --check
	mypy

clean:
	rm -rf $(VENV) data runs

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "merit_ds needs Python 3.11 or newer: PYTHON=python3.12 make ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a minute or two, longer where packages have to be downloaded"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	$(BIN)/python -m merit_ds.training.cpu_comm
	touch $@

data/wiki.json: | $(VENV)/ready
	$(BIN)/python -m merit_ds.training.data wiki --output data/wiki --tokenizer byte
