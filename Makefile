# The two commands of a new user:  make demo   and   make test.
# Each sets everything up first (once): a virtual environment in .venv with all requirements.

VENV    := .venv
PYTHON  := $(VENV)/bin/python
SYSTEM  ?= python3

.PHONY: setup demo claim test test-browser check clean

setup: $(VENV)/.installed

# uv installs in about a minute where pip takes several; pip does it when uv cannot be had.
$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(SYSTEM) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed; set SYSTEM=/path/to/python3.11"; exit 2; }
	$(SYSTEM) -m venv $(VENV)
	@if $(PYTHON) -m pip install --quiet uv; then \
	  $(PYTHON) -m uv pip install --python $(PYTHON) -r requirements-dev.txt -e . ; \
	else \
	  $(PYTHON) -m pip install -r requirements-dev.txt -e . ; \
	fi
	@touch $@

demo: setup
	$(PYTHON) scripts/demo.py

# The experiment of docs/claim.md: hours of CPU; a stopped run goes on, and the results file grows.
claim: setup
	$(PYTHON) scripts/claim.py --config scripts/configs/claim.yaml

# One thread per worker: the tests' tensors are tiny, and threads that wait for each other cost more.
test: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not browser"

# The report's pages in a real browser; installs Chromium (Debian's package) and axe-core (npm).
test-browser: setup
	scripts/making/install_browser.sh
	$(PYTHON) -m pytest -m browser

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) output
