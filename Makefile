# Everything runs in a virtual environment beside this file. Where the path of the checkout is
# one that no environment can live in (a colon in it), name another: make VENV=/elsewhere demo
PYTHON ?= python3
VENV ?= .venv
IN_VENV := $(VENV)/bin/python

.PHONY: demo test lint models clean

demo: $(VENV)/.demo-installed
	$(IN_VENV) models/demo.py

# One thread for linear algebra in each test process: more would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(IN_VENV) -m pytest

lint: $(VENV)/.dev-installed
	$(IN_VENV) -m ruff check
	$(IN_VENV) -m ruff format --check
	$(IN_VENV) -m mypy

# Trains the demo models anew; put the accuracies it prints into models/README.md.
models: $(VENV)/.dev-installed
	$(IN_VENV) models/digits_cnn.py
	$(IN_VENV) models/digits_vit.py
	cd models && sha256sum digits_cnn.onnx digits_vit.onnx > SHA256SUMS

clean:
	rm -rf .venv .demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp, not the interpreter, is the target: a creation that failed half-way is done again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "onnx-utilrank needs Python 3.11 or newer, and '$(PYTHON)' is not;" \
	        "name one that is: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# One stamp for each extra of pyproject.toml.
$(VENV)/.%-installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(IN_VENV) -m pip install -e ".[$*]" -c constraints.txt
	touch $@
