# make demo: the main job on real input.  make test: everything that must hold.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
JOBS ?= 2
unexport PYTHONDONTWRITEBYTECODE  # each process would compile anew what pip did not

.PHONY: help demo test lint types unit docs pictures figures notebooks matrix test-all test-exact fuzz
.PHONY: mutations bench bench-streaming test-compat test-latest test-oldest test-wheel test-sdist clean

help:
	@echo "make demo         prune a keyword recogniser in several ways (no download, about four minutes)"
	@echo "make test         lint, types, tests, doctests, documentation; of long products of cases a covering part"
	@echo "make test-all     all tests: every family in every way, tests that take long"
	@echo "make pictures     draws the pictures of the documentation anew"
	@echo "make figures      measures accuracies anew that are out of date, and writes them into README and documentation"
	@echo "make notebooks    executes examples/notebooks anew and keeps the outputs, which the documentation shows (minutes)"
	@echo "make matrix       every model family pruned and checked, an hour or two; writes docs/reference/matrix.rst"
	@echo "make test-exact   the exactness law on 200 random cases for every family and mode"
	@echo "make fuzz         10,000 broken directories and plans, 200 killed saves"
	@echo "make mutations    faults put into the library one at a time; says which no test sees"
	@echo "make bench        benchmarks against peers: tables, and bench/speed.json, .md and .png"
	@echo "make bench-streaming  memory of pruning a checkpoint of 4 GB on the disk; needs 9 GB there"
	@echo "make test-compat  the Hugging Face adapters under transformers 4.48 to 5, Lightning 2.4 and 2.5"
	@echo "make test-latest  everything that must hold, with the newest version of all that it needs"
	@echo "make test-oldest  adapters and laws with the oldest version of all that it needs"
	@echo "make test-wheel   the built wheel in an empty environment"
	@echo "make test-sdist   some of the tests that the built sdist holds, run from there"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt -e ".[dev,docs]"
	$(BIN)/pip install -q --no-compile -c constraints.txt --no-deps timm  # torchvision needs a build for this very torch
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(MAKE) -j 2 unit types docs  # types, then documentation, beside the tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/pytest -n $(JOBS) --dist loadgroup

docs: $(STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/links.py docs/_build/html

pictures: $(STAMP)
	$(BIN)/python examples/pictures.py
	$(BIN)/python docs/house.py

# Goes on where it was stopped; names what takes a machine of its own, and leaves it as it was measured.
figures: $(STAMP)
	$(BIN)/python -m benchmarks.figures

# In an environment of its own: where torchao is installed, transformers imports it.
notebooks: .venv-notebooks/.installed
	.venv-notebooks/bin/python examples/notebooks/execute.py
	$(MAKE) docs

.venv-notebooks/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-notebooks
	.venv-notebooks/bin/pip install -q -c constraints.txt -e ".[hf,plot,export,notebooks]"
	@touch $@

# Families of packages that nothing else here needs, each in a process of its own; goes on where it was stopped.
matrix: .venv-matrix/.installed
	.venv-matrix/bin/python -m benchmarks.matrix.run
	.venv-matrix/bin/python -m benchmarks.matrix.page

.venv-matrix/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-matrix
	.venv-matrix/bin/pip install -q -c constraints.txt -e ".[hf]" timm torchvision diffusers x-transformers \
	  open_clip_torch scipy
	@touch $@

# All of what tests/selection.py and the markers in tests/conftest.py leave out of make test.
test-all test-exact test-compat test-latest test-oldest: export ATTNPRUNE_ALL = 1
test-all: unit

test-exact: $(STAMP)
	ATTNPRUNE_CASES=200 $(BIN)/pytest tests/test_exact.py tests/test_four_ratios.py -n $(JOBS) --dist loadgroup

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz_files

mutations: $(STAMP)
	JOBS=$(JOBS) $(BIN)/python -m tests.mutations

bench-streaming: $(STAMP)
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/large_llama.py

paper-table: $(STAMP)
	$(BIN)/python examples/keywords/generate.py paper_table_work --only train --per-class 700
	$(BIN)/python benchmarks/paper_table.py --train paper_table_work/train.safetensors --seeds 0 1 2

bench: $(STAMP)
	$(BIN)/python benchmarks/pruning_cost.py
	$(BIN)/python benchmarks/scoring_cost.py
	$(BIN)/python benchmarks/import_cost.py
	$(BIN)/python benchmarks/closed_form_cost.py --clips 64
	$(BIN)/python benchmarks/speed.py --out bench
	$(BIN)/python benchmarks/latency_budget.py
	$(BIN)/python benchmarks/scoring_memory.py
	$(BIN)/python benchmarks/accuracy.py keywords

COMPAT ?= 4.48.3 4.53.3 4.57.6 5.23.0
LIGHTNING ?= 2.4.0 2.5.6
test-compat:
	for version in $(COMPAT); do \
	  $(PYTHON) -m venv .venv-compat-$$version && \
	  .venv-compat-$$version/bin/pip install -q torch==2.13.0 "transformers==$$version" -e . accelerate pytest hypothesis && \
	  .venv-compat-$$version/bin/pytest tests/test_compat.py tests/test_recognised.py tests/test_hosts.py -o addopts= || exit 1; \
	done
	for version in $(LIGHTNING); do \
	  $(PYTHON) -m venv .venv-compat-lightning-$$version && \
	  .venv-compat-lightning-$$version/bin/pip install -q torch==2.13.0 "lightning==$$version" -e . pytest hypothesis && \
	  .venv-compat-lightning-$$version/bin/pytest tests/test_lightning.py -W default -o addopts= || exit 1; \
	done

# The newest of everything, without constraints. TORCH=torch==2.13.0 keeps a torch that is there.
TORCH ?= torch
test-latest:
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install -q -U --upgrade-strategy eager $(TORCH) -e ".[dev,docs]"
	.venv-latest/bin/pip install -q -U --no-deps timm
	.venv-latest/bin/pip list
	.venv-latest/bin/pytest -n $(JOBS) --dist loadgroup

# The oldest that pyproject.toml allows, or TORCH=torch==2.13.0 where that torch cannot be had.
OLDEST = tests/test_compat.py tests/test_recognised.py tests/test_hosts.py tests/test_mha.py tests/test_hf.py \
  tests/test_timm.py
test-oldest: TORCH =
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/floors.py $(TORCH) > .venv-oldest/floors.txt
	grep -v ^timm .venv-oldest/floors.txt | .venv-oldest/bin/pip install -q -r /dev/stdin
	grep ^timm .venv-oldest/floors.txt | .venv-oldest/bin/pip install -q --no-deps -r /dev/stdin
	.venv-oldest/bin/pip install -q --no-deps -e .
	.venv-oldest/bin/pip list
	.venv-oldest/bin/pytest $(OLDEST) -o addopts= -W default -n $(JOBS)
	.venv-oldest/bin/pytest tests/test_laws.py -k 'MHA or Encoder or Transformer or TorchvisionViT or Timm]' \
	  -o addopts= -W default -n $(JOBS)  # the models of transformers there are those of 5; test_compat has the others

test-wheel: $(STAMP)
	rm -rf dist .venv-wheel
	$(BIN)/python -m build -q --wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q torch==2.13.0 dist/*.whl
	cd / && $(CURDIR)/.venv-wheel/bin/python -W error -c "import torch, attnprune; \
	  m = torch.nn.MultiheadAttention(64, 4); print(attnprune.prune_attention(m, 0.5))"

# Tests of every kind that an sdist must bring along for: examples, benchmarks, docs, data.
IN_SDIST = README.md tests/test_imports.py tests/test_docs.py tests/test_plan_file.py tests/test_examples.py \
  tests/test_cli.py tests/test_llama_benchmark.py
test-sdist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build -q --sdist
	cd dist && tar -xzf *.tar.gz && cd attnprune-*/ && \
	  PYTHONPATH=src $(abspath $(BIN))/python -m pytest -p no:cacheprovider $(IN_SDIST)

clean:
	rm -rf $(VENV) .venv-* dist bench docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
