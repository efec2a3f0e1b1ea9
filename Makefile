# Each target does its own set-up; a second call is fast. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup train test faults cluster check fix exactness bench bench-gpu clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.done  ## .venv with the package and the tested versions of what it needs
# The test needs of pyproject.toml come as a dependency group, which pip before 25.1 does not know: hence the upgrade.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[timm,svhn,tensorboard,plot]' --group dev
	touch $@

train: setup     ## the bundled MNIST on two processes
	dist-train train -c mnist --nproc 2

test: setup      ## the CPU test suite, without a cluster
	pytest -q -n 2 --dist worksteal -m 'not cluster'

cluster: setup   ## trainings on a real Slurm and on several hosts, made on this machine; needs root, slurm-wlm, iproute2
	pytest -q -n 2 --dist loadfile --timeout 3600 -m cluster

faults: setup    ## kills, damages and mutated configs in full; prints the table of docs/faults.md
	pytest -q -n 2 --dist load --all-faults tests/faults

check: setup     ## format, lint, types, shell scripts
	ruff format --check .
	ruff check .
	mypy
	shellcheck launch/*.sh slurm/*.sbatch .ci/run

fix: setup       ## format, and mend what the linter can
	ruff check --fix .
	ruff format .

exactness: setup ## 400 steps in float64 for every net and division; writes docs/exactness.md
	python tests/exactness/measure.py

bench: setup     ## this harness beside the loops that people write; writes bench/
	dist-train bench

bench-gpu: setup ## a quick part of it for one GPU: mlp and conv in fp32 and bf16, and the speedrun
	dist-train bench speed speedrun --net mlp --net conv --precision no --precision bf16 --steps 200 --repetitions 1

clean:           ## remove what the targets made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
