# Needs Python 3.11 or later and make; the proto lint and pyright need npm too. `make help` lists the targets.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
BUF := 1.75.0
PYRIGHT := 1.1.414
NPM_STAMP := .tools/buf-$(BUF)-pyright-$(PYRIGHT).stamp
PROTOS := $(wildcard protos/optserve/v1/*.proto)
PROTOC := $(BIN)/python -m grpc_tools.protoc -I protos

.PHONY: help demo test check format lint types stubs stubs-check npm-check bench clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1~/p' Makefile | awk -F'~' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: .venv/demo.stamp ## train the digits with two worker processes through a server; ARGS="--workers 4"
	$(BIN)/optserve demo $(ARGS)

test: .venv/test.stamp ## all tests; ARGS="-k adam" for some
	$(BIN)/pytest $(ARGS)

check: lint types stubs-check npm-check ## everything but the tests: format, lint, types, stubs, contract

format: .venv/test.stamp ## rewrite the Python files in the project's format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

stubs: .venv/test.stamp ## generate the Python stubs from protos/
	$(PROTOC) --python_out=protos --pyi_out=protos --grpc_python_out=protos $(PROTOS)

bench: .venv/test.stamp ## the benchmarks, each beside its peers
	for question in kernels wire step sparse; do $(BIN)/python benchmarks/$$question.py $(ARGS) || exit; done

clean: ## remove what the targets above made
	rm -rf .venv .tools build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis

lint: .venv/test.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: .venv/test.stamp
	$(BIN)/mypy

stubs-check: .venv/test.stamp
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(PROTOC) --python_out="$$fresh" --pyi_out="$$fresh" --grpc_python_out="$$fresh" $(PROTOS) && \
	diff -rq -x '*.proto' -x py.typed -x __pycache__ "$$fresh/optserve/v1" protos/optserve/v1 || \
	{ echo "the stubs in protos/optserve/v1 are not what the protos give: run 'make stubs'"; exit 1; }

ifneq ($(shell command -v npm),)
npm-check: $(NPM_STAMP) .venv/test.stamp
	.tools/node_modules/.bin/buf format --diff --exit-code protos
	.tools/node_modules/.bin/buf lint protos
	.tools/node_modules/.bin/pyright --pythonpath $(BIN)/python
else
npm-check:
	@echo "NOT CHECKED: buf and pyright need npm, which is not installed"
	@[ "$(CI)" != true ]
endif

$(NPM_STAMP):
	@mkdir -p .tools && rm -f .tools/*.stamp
	npm install --prefix .tools --no-save --no-audit --no-fund --loglevel=error @bufbuild/buf@$(BUF) pyright@$(PYRIGHT)
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is not Python 3.11 or later; name one that is: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# The demo goes without torch and the tools, hence two stages, one after the other.
.venv/demo.stamp: pyproject.toml | .venv/bin/python
	@echo "installing optserve and what the demo needs into .venv (once)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

.venv/test.stamp: .venv/demo.stamp
	@echo "installing what the tests need, torch among it (once; minutes where torch has to be downloaded)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
