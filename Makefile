# Two commands for a bare clone; each makes .venv first if it is not there. Needs make, git and Python >= 3.11.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: distill test lint clean

distill: .venv/installed  ## the main job: teacher, students and their table on real data
	@echo "== distilling on scikit-learn's digits; results go to runs/distill (about a minute)"
	$(RUN) -m experiments.distill

test: .venv/installed  ## the tests
	@echo "== running the tests (about a quarter of an hour on two cores)"
	$(RUN) -m pytest

lint: .venv/installed  ## formatting, lint and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

.venv/installed: requirements.txt setup.cfg
	@echo "== making .venv and installing the pinned requirements into it (about a minute)"
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'kdflax needs Python >= 3.11, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:  ## remove what the commands made
	rm -rf .venv runs .pytest_cache .ruff_cache *.egg-info
