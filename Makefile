# `make` or `make help` lists what there is. Each target installs what it needs into .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
INSTALLED := $(VENV)/.installed
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo quick test prove same-curve curve-gpu keys optimizers templates chaos survive plan-check plan-scale plan-gpu bench bench-quick bench-peers bench-gpu gpu-day workshop docs lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(INSTALLED) ## put Stepladder and all it needs into .venv

# What training, planning, comparing and merging need. torch comes first and by the constraint: another version
# brings gigabytes of CUDA packages.
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed and '$(PYTHON)' is not. Install it: sudo apt install python3 (or: make PYTHON=python3.12)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing. Install it: sudo apt install python3-venv"; exit 2; }
	@echo "[1/3] a virtual environment in $(VENV), with pip"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	@echo "[2/3] PyTorch (about 200 MB for a CPU, 3 GB for CUDA)"
	@$(PIP_INSTALL) torch
	@echo "[3/3] Stepladder with Transformers, TRL, PEFT and Accelerate"
	@$(PIP_INSTALL) --editable .
	@touch $@

# DeepSpeed's build imports torch, so it is built without isolation. Its setup asks for nvcc where it finds a GPU;
# nothing used here needs an op that it would compile.
$(INSTALLED): $(BASE)
	@echo "DeepSpeed, the trackers, lm-eval, and the tools for tests and documentation"
	@$(PIP_INSTALL) --editable ".[dev,eval,monitoring]"
	@DS_ACCELERATOR=cpu $(PIP_INSTALL) --no-build-isolation --editable ".[deepspeed]"
	@touch $@

models/smollm2-135m-instruct: | $(BASE)
	$(BIN)/python scripts/fetch_model.py

demo: $(BASE) models/smollm2-135m-instruct ## train LoRA on TechCo's answers, then compare base and tuned (under 4 minutes on 2 cores, installation included)
	$(BIN)/python scripts/sft.py --recipe lora --output_dir runs/demo --overwrite
	$(BIN)/python scripts/compare.py --base models/smollm2-135m-instruct --tuned runs/demo --data data/techco_eval.jsonl --rubric data/techco_rubric.yaml --limit 12

quick: $(INSTALLED) models/smollm2-135m-instruct ## the tests to run before each commit: a part of each area (under 3 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not heavy and not alone and not proof"

# DeepSpeed compiles a small communication op on its first use; without a compiler its
# tests would fail with a page of ninja's output, so what is missing is named here.
test: WHICH = and not proof
test: prove ## run the tests but for the longest proofs (about 15 minutes on 2 cores)

prove: $(INSTALLED) models/smollm2-135m-instruct ## run every test: kills, Slurm, the workshop's pages too (about 40 minutes on 2 cores)
	@command -v c++ >/dev/null || { echo "DeepSpeed needs a C++ compiler. Install it: sudo apt install g++"; exit 2; }
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
		{ echo "DeepSpeed needs Python's headers. Install them: sudo apt install python3-dev"; exit 2; }
	@# Two files side by side, each with half of the cores (tests/conftest.py); then what depends on time, by itself.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone $(WHICH)"
	$(BIN)/python -m pytest -m "alone $(WHICH)"

same-curve: $(INSTALLED) models/smollm2-135m-instruct ## every method under every strategy against one process; writes docs/compatibility.md (over an hour)
	$(BIN)/python tests/same_curve.py

curve-gpu: $(INSTALLED) models/smollm2-135m-instruct ## every method on a CUDA GPU against the CPU (not run yet; ten minutes)
	$(BIN)/python tests/same_curve.py --gpu

keys: $(INSTALLED) models/smollm2-135m-instruct ## give each key of a recipe each kind of value: none may end in a traceback (about 15 minutes)
	$(BIN)/python tests/every_key.py

optimizers: $(INSTALLED) models/smollm2-135m-instruct ## each optimizer under each strategy by each method: none may end in a traceback (an hour)
	$(BIN)/python tests/every_optimizer.py

templates: $(INSTALLED) models/smollm2-135m-instruct ## what each chat template does with each kind of conversation; writes docs/templates.md (a minute)
	$(BIN)/python tests/chat_templates.py --page docs/templates.md

chaos: $(INSTALLED) models/smollm2-135m-instruct ## throw 100 faults at tiny runs, compare their curves, write docs/reliability.md (about an hour)
	$(BIN)/python tests/chaos.py --runs 100 --report docs/reliability.md

survive: $(INSTALLED) models/smollm2-135m-instruct ## what saves and resumed starts cost; writes docs/reliability.md (10 minutes)
	$(BIN)/python benchmarks/survive.py --report docs/reliability.md

plan-check: $(INSTALLED) models/smollm2-135m-instruct ## hold the plan's peak memory against real steps; writes docs/planning.md (about 20 minutes)
	$(BIN)/python benchmarks/plan.py --folder runs/plan-check --page docs/planning.md

plan-scale: $(INSTALLED) ## hold the plan of up to 512 ranks against PyTorch on fake tensors; writes docs/planning.md (about 5 minutes)
	$(BIN)/python benchmarks/plan_scale.py --page docs/planning.md
	$(BIN)/python benchmarks/plan_zero3.py --page docs/planning.md

plan-gpu: $(INSTALLED) ## the same on a CUDA GPU, with random weights of 0.6 to 8 billion parameters (not run yet: see docs/planning.md)
	$(BIN)/python benchmarks/plan_gpu.py --folder runs/plan-gpu --page docs/planning.md

bench: $(INSTALLED) models/smollm2-135m-instruct ## training beside `trl sft` and a bare loop, what each setting is worth, and a second process (about three hours)
	$(BIN)/python benchmarks/train.py --repeat 3
	$(BIN)/python benchmarks/train.py --repeat 3 --ladder
	$(BIN)/python benchmarks/scaling.py --method lora --repeat 3

bench-quick: $(INSTALLED) models/smollm2-135m-instruct ## the ratio to `trl sft` with its best flags, once (3 minutes)
	$(BIN)/python benchmarks/train.py --quick

bench-peers: $(INSTALLED) models/smollm2-135m-instruct ## the same rows by ms-swift and litgpt, which it installs into runs/peers
	$(BIN)/python benchmarks/peers.py --repeat 2

bench-gpu: $(INSTALLED) ## tokens/s, MFU and memory on a CUDA GPU beside `trl sft`, with random weights (not run yet)
	$(BIN)/python benchmarks/train_gpu.py --folder runs/bench-gpu

gpu-day: $(INSTALLED) ## all that is to be found out on a CUDA GPU, in 15 minutes, what is worth most first (docs/benchmarks.md; not run yet)
	$(BIN)/python benchmarks/gpu_day.py

workshop: $(INSTALLED) models/smollm2-135m-instruct ## run every activity of the workshop in full, and refresh what its pages show
	$(BIN)/python tests/pages.py $(sort $(wildcard docs/workshop/*.md))

docs: $(INSTALLED) ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(INSTALLED) ## ruff, mypy and shellcheck, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources slurm/*.sh slurm/sites/*.sh slurm/*.sbatch container/*.sh .ci/run

format: $(INSTALLED) ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, models and runs
	rm -rf $(VENV) models runs/*
