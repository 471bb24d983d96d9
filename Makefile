# Every target builds the environment it needs: `make test` works in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
# Held where the wheels of a machine are known to work; `make lock TORCH=` takes the newest.
TORCH ?= torch==2.14.1 torchvision==0.29.1

# Processes that the tests are spread over. One more than two cores: a fifth of the time a test waits for another process.
WORKERS ?= 3

# What a card is lent for, less what building takes.
MINUTES ?= 12

.PHONY: help env demo test faults check lint format release-check docs bench card lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

env: $(STAMP)  ## the development environment in .venv, from requirements.lock

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: env  ## a whole fine-tune in miniature, on any machine
	$(BIN)/qif demo .

test: env  ## the tests
	$(BIN)/python -m pytest -n $(WORKERS)

faults: env  ## kills, full disks, damage and hostile input at full counts, one line for each fault
	$(BIN)/python scripts/faults.py -n $(WORKERS)

lint: env  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## everything that must pass before a commit

format: env  ## rewrite the files as lint wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

release-check: env  ## what must be true of a release: archives, metadata, an installation, the demo from it, links
	$(BIN)/python scripts/release_check.py

docs: env  ## the documentation as a site, in build/site
	$(BIN)/python scripts/build_docs.py

bench: env  ## the measurements of the documentation
	$(BIN)/python scripts/bench.py

card: env  ## what is most worth knowing about the card of this machine, in MINUTES
	$(BIN)/python scripts/card.py --minutes $(MINUTES)

lock: env  ## resolve requirements.lock anew
	printf '%s\n' $(TORCH) > .venv/torch.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --constraint .venv/torch.txt \
	  --upgrade --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	  --output-file requirements.lock

clean:  ## remove caches and builds; the environment and all outputs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qwen_image_finetune src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
