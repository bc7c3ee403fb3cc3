PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
RAY := $(VENV)/.ray
ZOO := $(VENV)/.zoo
OLDEST_TRITON := 3.6.0
NEWER_TRITONS := 3.8.0 3.9.0
OTHER_TRITONS := $(OLDEST_TRITON) $(NEWER_TRITONS)
NEWEST_TRITON := $(lastword $(NEWER_TRITONS))

# What a user's shell may export must not change what the tests check.
HERMETIC := env -u PYTHONPATH -u PYTHONHOME -u PYTHONWARNINGS -u PYTHONOPTIMIZE -u PYTEST_ADDOPTS -u PYTEST_PLUGINS \
	-u TRITON_INTERPRET -u TRITON_DEBUG -u TRITON_KERNEL_OVERRIDE -u TRITON_DEFAULT_BACKEND -u TRITON_OVERRIDE_ARCH \
	-u TORCHDYNAMO_DISABLE -u TORCH_COMPILE_DISABLE -u TORCH_LOGS

# Each worker begins with a half of its own, so most of what a file prepares is prepared once.
TWO := -n 2 --dist worksteal

# In a rule for another Triton, $* is its version.
WITH_TRITON = $(HERMETIC) PYTHONPATH="$(CURDIR)/$(VENV)/triton-$*"

# pip's warnings run to pages on some machines; -qq keeps its errors.
PIP := $(PY) -m pip install -qq --no-input --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SILENT:
.PHONY: help env demo test slow zoo fuzz headroom lint types docs mutate verify package codegen codegen-all \
	codegen-oldest codegen-newest codegen-newer $(OTHER_TRITONS:%=codegen-%) \
	test-newest test-newer $(NEWER_TRITONS:%=test-%) software-gpu bench bench-gpu clean

help: ## this list
	awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	echo 'ARGS="..." is passed on, as in: make demo ARGS=--json'

env: $(STAMP) ## build .venv (the other commands do it when it is missing or out of date)

# All output goes to stderr: stdout belongs to the command that needed the environment.
$(STAMP): pyproject.toml constraints.txt
	echo 'Building $(VENV) (once; it takes a few minutes) ...' >&2
	$(PYTHON) -m venv $(VENV) >&2
	$(PIP) -c constraints.txt -e '.[dev]' >&2
	touch $@

# Half a minute and half a gigabyte that only slow tests need.
$(RAY): $(STAMP)
	$(PIP) -c constraints.txt -e '.[ray]' >&2
	touch $@

$(ZOO): $(STAMP)
	$(PIP) -c constraints.txt -e '.[zoo]' >&2
	touch $@

$(OTHER_TRITONS:%=$(VENV)/triton-%/.installed): $(VENV)/triton-%/.installed: $(STAMP)
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) triton==$* >&2
	$(WITH_TRITON) $(PY) -c 'import triton; assert triton.__version__ == "$*", triton'
	touch $@

demo: $(STAMP) ## compare a ResNet-18 with and without the kernels on this machine
	$(PY) -m resnet_triton demo $(ARGS)

# One thread a worker: torch would otherwise start a thread per core in each of them.
test: $(STAMP) ## run the tests, except those of `make slow` and `make package`
	$(HERMETIC) OMP_NUM_THREADS=1 $(PY) -m pytest $(TWO) -m 'not packaging and not slow' $(ARGS)

test-newest: test-$(NEWEST_TRITON) ## the tests of kernels and machine code, slow ones too, with the newest Triton

test-newer: $(NEWER_TRITONS:%=test-%) ## the same by every Triton newer than the one of .venv; no part of CI

$(NEWER_TRITONS:%=test-%): test-%: $(VENV)/triton-%/.installed
	$(WITH_TRITON) OMP_NUM_THREADS=1 $(PY) -m pytest $(TWO) tests/kernels tests/tools/test_codegen.py $(ARGS)

software-gpu: $(STAMP) ## the tests of GPUs, on one in software: 25 minutes, 18 GB; needs PyTorch's build for CUDA 13
	$(HERMETIC) PYTHONPATH=tests OMP_NUM_THREADS=1 $(PY) -m pytest $(TWO) -p software_gpu \
		tests/model/test_software_gpu.py tests/model/test_gpu.py $(ARGS)

slow: $(STAMP) $(RAY) $(ZOO) ## run the tests that take long by themselves
	$(HERMETIC) OMP_NUM_THREADS=1 $(PY) -m pytest $(TWO) -m slow $(ARGS)

zoo: $(STAMP) $(ZOO) ## optimize models of timm, transformers and torchvision, and compare their answers
	$(HERMETIC) OMP_NUM_THREADS=1 $(PY) -m pytest $(TWO) -m slow tests/model/test_zoo.py $(ARGS)

fuzz: $(STAMP) ## 20,000 random calls of the operators, bit for bit against fp64; FUZZ_CASES=N for another number
	$(HERMETIC) OMP_NUM_THREADS=1 FUZZ_CASES=$${FUZZ_CASES:-20000} FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} \
		$(PY) -m pytest -n 2 tests/kernels/test_fuzz.py $(ARGS)

headroom: $(STAMP) ## measure how much of the error bound each operator needs, into tests/headroom.json; ten minutes
	$(HERMETIC) OMP_NUM_THREADS=1 $(PY) tests/headroom.py $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP) ## mypy
	$(PY) -m mypy

docs: $(STAMP) ## the API reference, written from docstrings to build/docs
	$(PY) -m pdoc --no-show-source -o build/docs resnet_triton '!resnet_triton\.(?!functional$$)' $(ARGS)

mutate: $(STAMP) ## plant faults in the kernels, see which of them the tests miss; takes long, ARGS=--help says less
	$(HERMETIC) PYTHONPATH=tests TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m reliability.mutate $(ARGS)

# Everything that needs no GPU, and on a GPU its tests as well. Sized for an hour on two cores.
verify: $(STAMP) ## every check in turn, and a table of what passed
	$(HERMETIC) PYTHONPATH=tests $(PY) -m reliability.verify $(ARGS)

package: $(STAMP) ## build, install and import the distributions
	$(HERMETIC) $(PY) -m pytest -m packaging $(ARGS)

codegen: $(STAMP) ## compile the kernels ahead of time, check the machine code and its budget; needs no GPU
	$(HERMETIC) $(PY) -m resnet_triton codegen --budget benchmarks/results/codegen.json $(ARGS)

codegen-all: $(STAMP) ## the same for every target, and write the budget in benchmarks/results anew
	$(HERMETIC) $(PY) -m resnet_triton codegen --archs 80,86,89,90,100,120 --out benchmarks/results $(ARGS)

codegen-oldest: codegen-$(OLDEST_TRITON) ## the same with the oldest supported Triton

codegen-newest: codegen-$(NEWEST_TRITON) ## the same with the newest Triton

codegen-newer: $(NEWER_TRITONS:%=codegen-%) ## the same with every Triton newer than the one of .venv; no part of CI

$(OTHER_TRITONS:%=codegen-%): codegen-%: $(VENV)/triton-%/.installed
	$(WITH_TRITON) $(PY) -m resnet_triton codegen $(ARGS)

bench: $(STAMP) ## time ResNet-18 and its layers against PyTorch's on this machine: tables and charts in build/bench
	$(PY) -m resnet_triton bench --out build/bench $(ARGS)

bench-gpu: $(STAMP) ## everything to check and measure on a GPU, in ten minutes; ARGS=--rehearse without one
	$(PY) -m benchmarks.gpu --out build/gpu $(ARGS)

clean: ## remove builds and caches (not .venv, nor what a GPU has measured)
	rm -rf $(filter-out build/gpu,$(wildcard build/*)) dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
