# Two commands do everything on a new machine with Python ≥ 3.11 and git: `make trace` and `make test`.
# The versions are those of constraints.txt, for Python 3.11 to 3.14.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= The capital of the state containing Dallas is
# Threads that spin while they wait make torch several times slower on a busy machine.
export OMP_WAIT_POLICY ?= passive
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: trace test test-slow pythons lowest check format bench interop gpu gpu-bench docs cli pocket clean mutants fuzz

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}. Try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@echo "Installing into $(VENV) (a few minutes the first time) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need …"
	@$(PIP) --editable '.[dev]'
	@touch $@

trace: $(VENV)/.installed  ## trace a prompt on the embedded model, validate its edges, write the HTML
	@$(BIN)/circuitsae trace "$(PROMPT)"

test: $(VENV)/.installed-dev  ## the whole suite, but what is marked slow or gpu
	@sh tests/e2e/install_chromium.sh
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

pythons: $(VENV)/.installed-dev  ## the suite without browser, slow and page tests, on every Python that is here
	$(BIN)/nox --sessions tests

lowest: $(VENV)/.installed-dev  ## the same with the lowest versions that pyproject.toml allows
	$(BIN)/nox --sessions lowest

gpu: $(VENV)/.installed-dev  ## the checks that need a CUDA device
	$(BIN)/python -m pytest -m gpu

gpu-bench: $(VENV)/.installed-dev  ## speed on a GPU beside other packages, six minutes and their installation; goes on where it was
	$(BIN)/python benchmarks/gpu.py $(ARGS)

check: $(VENV)/.installed-dev  ## lint, format, types, layers, declared dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/deptry .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## every claim about speed, as a ratio measured in one run
	@for script in $(filter-out benchmarks/machine.py benchmarks/kinds.py benchmarks/ablation.py $(wildcard benchmarks/gpu*.py),$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python $$script || exit 1; done

interop: $(VENV)/.installed-dev  ## other communities' packages, in environments of their own (8 GB), against ours
	$(BIN)/python -m benchmarks.interop.run

cli: $(VENV)/.installed  ## write the page of the command line again
	$(BIN)/python docs/write_cli.py
	$(BIN)/python docs/write_formats.py
	$(BIN)/python docs/write_scaling.py
	$(BIN)/python docs/write_audit.py

docs: $(VENV)/.installed-dev
	@$(PIP) --editable '.[docs]'
	$(BIN)/mkdocs build --strict

pocket: $(VENV)/.installed-dev  ## rebuild the embedded model and its dictionaries (about an hour on 2 cores; resumable)
	$(BIN)/python -m examples.pocket.recipe

clean:
	rm -rf $(VENV) .nox runs graphs site dist

mutants: $(VENV)/.installed-dev  ## does a test fail for each small change of what attributes, intervenes and judges? (hours)
	@$(PIP) mutmut
	$(BIN)/mutmut run --max-children 2 $(ONLY)
	$(BIN)/mutmut results

fuzz: $(VENV)/.installed-dev  ## 3000 damaged inputs; FUZZ_FIRST=<number> starts elsewhere
	FUZZ_CASES=$${FUZZ_CASES:-3000} $(BIN)/python -m pytest -n 2 tests/e2e/test_fuzz.py
