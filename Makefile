# make demo | test | lint | types | bench     everything runs in .venv, which the first call makes.
# Options: make test ARGS="-k mel", JOBS=8, PYTHON=python3.12, FASTLOOP_NO_NATIVE=1 (no compiler).
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1

INSTALLED := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
SOURCES := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: help demo test lint types bench install clean
help:
	@sed -n '1,2s/^# //p' Makefile

demo: install
	$(BIN)/fastloop listen --demo $(ARGS)

test: install
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

install: $(COMPILED)

# Installing compiles too, so the second rule runs on its own only where csrc/ changed afterwards.
$(INSTALLED): setup.py pyproject.toml constraints.txt .ci/bootstrap .ci/install
	.ci/install
	@touch $@

$(COMPILED): $(INSTALLED) $(SOURCES)
	@if [ -e $@ ] || [ -n "$$(find $(SOURCES) -newer $(INSTALLED))" ]; then .ci/install native; fi
	@touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info fastloop/_native*.so
