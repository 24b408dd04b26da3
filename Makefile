.PHONY: check test real site constraints compat

check:  ## format, lint, types, fast tests: what a commit needs
	ruff format --check .
	ruff check .
	mypy
	pytest -m "not real_model and not packaging"

test:  ## everything but the minutes-long runs on real models
	pytest -m "not real_model"

real:  ## the main command and its control on the real default model
	pytest -m real_model

site:  ## the documentation with a page per method and the API reference, in build/site
	python docs/website.py build/site

TORCH = 2.13.0
constraints:  ## pins of the newest versions that the ranges allow, for all extras; commit them once the suite has passed
	rm -rf build/constraints && python3 -m venv build/constraints
	build/constraints/bin/pip install --quiet torch==$(TORCH) -e ".[test,bench,dialogue,eval,quant,ray,slurm,wandb,mlflow,trl]"
	{ echo "# What the test suite last passed with; made by: make constraints"; \
	  build/constraints/bin/pip freeze --exclude-editable | grep -v '^#' | sed 's/+cpu$$//'; } > constraints.txt
	rm -rf build/constraints

compat:  ## the lowest and the newest versions that the ranges allow: tests in each, and their table
	python experiments/compat/compat.py lowest newest --write
