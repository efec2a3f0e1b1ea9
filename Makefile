# Each target sets up what it needs; a second call is fast. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More workers than cores, as many tests wait. Cluster tests go to a few workers, each with its own cluster.
PYTEST := pytest -q -n 4 --dist loadgroup
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup train test test-all faults sets nets web-full cluster cluster-full cpus check fix exactness bench bench-gpu test-gpu clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.train  ## .venv with the tested versions of what training and its pictures need
$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt --editable '.[plot]'
	touch $@

# Tests and checks use dependency groups, which pip before 25.1 does not support: hence the upgrade.
$(VENV)/.test: $(VENV)/.train
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet -c constraints.txt --group test
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(BIN)/pip install --quiet -c constraints.txt --group check
	touch $@

train: setup     ## the bundled MNIST on two processes
	dist-train train -c mnist --nproc 2

test: $(VENV)/.test  ## the CPU test suite, without a cluster
	$(PYTEST) -m 'not cluster'

test-all: $(VENV)/.test  ## test and cluster in one run, so that waiting tests leave the cores to the others
	$(PYTEST)

cluster: $(VENV)/.test  ## trainings on a real Slurm and several hosts, created on this machine; needs root, slurm-wlm, iproute2
	$(PYTEST) -m cluster

cluster-full: $(VENV)/.test  ## the same with all jobs; prints the table of docs/cluster.md
	$(PYTEST) -m cluster --full

faults: $(VENV)/.test  ## all kills, damaged files and mutated configs; prints the table of docs/faults.md
	$(PYTEST) --full tests/faults

sets: $(VENV)/.test  ## random user data sets and nets: stopped, resumed with a different number of loader workers
	$(PYTEST) --full tests/data/test_random_sets.py

nets: $(VENV)/.test  ## torchvision and timm nets: trained, resumed, evaluated, exported
	$(PYTEST) --full tests/models/test_nets_of_others.py

web-full: $(VENV)/.test  ## the page, its queue and its uploads: all kills, cuts, histories and fuzzing
	$(PYTEST) --full tests/web tests/launch/test_queue_kills.py tests/user_code

# The kernels that MKL and oneDNN use on other processors. Threads that spin while waiting would slow all others.
CPUS := MKL_CBWR=COMPATIBLE MKL_CBWR=AVX2 MKL_CBWR=AVX512 ONEDNN_MAX_CPU_ISA=AVX2
cpus: $(VENV)/.test  ## all tests with the kernels of other processors, with one and two threads
	for cpu in $(CPUS); do for threads in 1 2; do echo "== $$cpu, threads: $$threads"; \
	env $$cpu TEST_THREADS=$$threads OMP_WAIT_POLICY=passive $(PYTEST) || exit 1; done; done

check: $(VENV)/.check  ## format, lint, types, shell scripts
	ruff format --check .
	ruff check .
	mypy
	shellcheck launch/*.sh slurm/*.sbatch .ci/run

fix: $(VENV)/.check  ## format, and fix what the linter can
	ruff check --fix .
	ruff format .

exactness: $(VENV)/.test  ## 400 steps in float64 for every net and division; writes docs/exactness.md
	python tests/exactness/measure.py

bench: $(VENV)/.test  ## this harness against common training loops; writes bench/
	dist-train bench

bench-gpu: $(VENV)/.test  ## a benchmark for one GPU, in eight minutes: five nets in each mode, saves, and the speedrun
	dist-train bench gpu checkpoint speedrun --repetitions 2

test-gpu: $(VENV)/.test  ## the tests that need a GPU; all others hide it
	pytest -q -m gpu

clean:           ## remove what the targets created
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
