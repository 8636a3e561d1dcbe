# `make train` and `make test` create the environment if necessary.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PRETRAIN_READY := $(VENV)/.ready-pretrain
NOTEBOOK_READY := $(VENV)/.ready-notebook
ARGS ?=

BENCHMARKS := training_step sampling kedro_run compare_methods score_base_model score_one_shot

SPRITE_FOLDER := data/01_raw/sprite_packages
SPRITE_FILES := $(addprefix $(SPRITE_FOLDER)/, \
	emojibase-data-17.0.0.tgz \
	iconify-json-emojione-1.2.3.tgz \
	iconify-json-fluent-emoji-1.2.7.tgz \
	iconify-json-fluent-emoji-flat-1.2.6.tgz \
	iconify-json-fxemoji-1.2.2.tgz \
	iconify-json-noto-1.2.9.tgz \
	iconify-json-noto-v1-1.2.5.tgz \
	iconify-json-streamline-emojis-1.2.4.tgz \
	iconify-json-twemoji-1.2.5.tgz)

.PHONY: help setup train evaluate generate test proofs lint format bench gpu sprites pretrain judge viz ui notebook

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## create the environment

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "expected Python 3.11 or newer; got " + sys.version.split()[0] + "; run make with PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

$(PRETRAIN_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,pretrain]'
	touch $(PRETRAIN_READY)

$(NOTEBOOK_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,notebook]'
	touch $(NOTEBOOK_READY)

train: $(READY) ## train a concept on the bundled picture and evaluate it (ARGS="--params subject=cat,image=cat.jpg" for another)
	$(BIN)/kedro run --pipeline train $(ARGS)
	$(BIN)/kedro run --pipeline evaluate $(ARGS)

evaluate: $(READY) ## evaluate the trained concept
	$(BIN)/kedro run --pipeline evaluate $(ARGS)

generate: $(READY) ## generate images with the trained concept
	$(BIN)/kedro run --pipeline generate $(ARGS)

test: $(READY) ## run all tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

proofs: $(READY) ## verify that a test fails when an option is ignored (minutes; ARGS="training.loss" for some)
	$(BIN)/python tests/ignore_options.py $(ARGS)

lint: $(READY) ## check style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## print speed and quality tables (trains many subjects: hours on a CPU)
	set -e; for table in $(BENCHMARKS); do echo "== $$table"; $(BIN)/python benchmarks/$$table.py $(ARGS); done

gpu: $(READY) ## run the GPU tests and all speed benchmarks on a GPU (25 minutes at most)
	$(BIN)/python benchmarks/gpu_hour.py $(ARGS)

sprites: $(PRETRAIN_READY) $(SPRITE_FILES) ## download and render the drawings of the base model (a minute; needs npm)
	$(BIN)/kedro run --pipeline pretrain --nodes render_sprites,render_held_out_sprites $(ARGS)

pretrain: $(PRETRAIN_READY) $(SPRITE_FILES) ## train the embedded base model (hours on a CPU; resumes)
	$(BIN)/kedro run --pipeline pretrain $(ARGS)

judge: $(PRETRAIN_READY) $(SPRITE_FILES) ## train the judge that evaluates the base model (over an hour on a CPU; resumes)
	$(BIN)/kedro run --pipeline judge $(ARGS)

viz: $(READY) ## show the pipelines in kedro-viz (ARGS="--params subject=cat" for another subject's results)
	$(BIN)/kedro viz run $(ARGS)

ui: $(READY) ## show the runs in MLflow
	$(BIN)/mlflow ui --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///data/09_tracking/mlflow.db}

notebook: $(NOTEBOOK_READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

# Published drawings, at the versions named above; catalog_pretrain.yml checks their hashes.
$(SPRITE_FOLDER):
	mkdir -p $@

$(SPRITE_FOLDER)/iconify-json-%.tgz: | $(SPRITE_FOLDER)
	npm pack --silent --pack-destination $(SPRITE_FOLDER) "@iconify-json/$$(echo '$*' | sed -E 's/-([0-9.]+)$$/@\1/')"

$(SPRITE_FOLDER)/emojibase-data-%.tgz: | $(SPRITE_FOLDER)
	npm pack --silent --pack-destination $(SPRITE_FOLDER) emojibase-data@$*
