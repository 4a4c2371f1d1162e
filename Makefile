# Needs Python 3.10 or newer and GNU make; everything else goes into .venv.
#   make train      train the row-LSTM on MNIST, results in runs/row-lstm    make train ARGS="--seed 1 --compare"
#   make test       the test suite                                           make test ARGS="-k mask"
#   make test-slow  the tests that take minutes
#   make test-oldest  the test suite with the oldest torch, numba and Triton that it is for, in .venv-oldest
#   make test-arm   what runs on 64-bit ARM, emulated on a Debian for x86-64, in .arm
#   make lint       ruff, mypy, import-linter
#   make docs       the site of the documentation, in site/; every warning is an error
#   make bench      all speeds beside torch and others                       make bench ARGS="layers --only T28-B128"
#   make clean      remove .venv and what was built

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Windows reads files in another encoding. A comment behind the value would leave a space in it.
export PYTHONUTF8 := 1

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

define CHECK_PYTHON
import sys
if sys.version_info < (3, 10):
    sys.exit("fastlstm needs Python 3.10 or newer, but %s is Python %d.%d; name another: make PYTHON=python3.12" % ((sys.executable,) + sys.version_info[:2]))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("%s cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" % sys.executable)
endef
export CHECK_PYTHON

.PHONY: train test test-slow test-oldest test-arm lint docs bench clean
.NOTPARALLEL: # pip installs into one environment, one at a time

train: $(VENV)/.installed-plots
	$(BIN)/python -m fastlstm.train $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal $(ARGS)

test-oldest: export PIP_CONSTRAINT := tests/oldest.txt
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=tests/oldest.txt

test-arm: $(VENV)/.installed-test
	tests/arm/run.sh $(BIN)/python $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) .venv-oldest .arm build dist site *.egg-info .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# Stamps inside the environment: installed again only when the packaging changes.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; name a Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml setup.py $(CONSTRAINTS)
	$(BIN)/python -m pip install -e ".[$*]"
	@touch $@
