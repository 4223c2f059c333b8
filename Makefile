# make demo: train on real digits, sample, measure.   make test: the whole suite.
# Everything happens inside .venv, with the versions pinned in constraints.txt.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test test-optimised test-slow lint format bench orders docs methods notebooks lock clean

demo: $(READY)
	$(PY) -m train.pretrain digits

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The same on the programs that users get, compiled with care; twice the time. Before a release.
test-optimised: export JAXDIFF_TEST_OPTIMISED = 1
test-optimised: test

# What takes minutes: real processes, large programs, long data. Not part of continuous integration;
# tests/slow/README.md keeps its last results.
test-slow: $(READY)
	$(PY) -m pytest -m slow

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m tools.methods --check

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Half an hour; make bench ARGS="--only train_step" a part, ARGS="--baseline before.json" beside another.
bench: $(READY)
	$(PY) -m benchmarks $(ARGS)

# The orders of the solvers, for METHODS.md; minutes.
orders: $(READY)
	PYTHONPATH=tests:tests/solvers $(PY) -m benchmarks.orders
	$(PY) -m tools.methods

# The documentation's site, in site/; a warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

methods: $(READY)
	$(PY) -m tools.methods

# Executes every notebook in place; twenty minutes.
notebooks: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks]'
	.venv/bin/jupyter-execute --inplace notebooks/*.ipynb

# The newest versions that work, for every Python at once; needs uv.
lock:
	{ echo "# Pinned versions for make demo, make test and continuous integration; make lock writes them."; \
	  echo 'jax<0.12' | uv pip compile -q --universal --python-version 3.11 --upgrade --no-annotate --no-header \
	  pyproject.toml --extra train --extra test --extra docs --extra notebooks -c -; } > constraints.tmp && mv constraints.tmp constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) must be Python 3.11 or newer; pass PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,test,docs]'
	touch $(READY)

clean:
	rm -rf .venv build site *.egg-info
