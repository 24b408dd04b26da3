.PHONY: check test real

check:  ## format, lint, types, fast tests: what a commit needs
	ruff format --check .
	ruff check .
	mypy
	pytest -m "not real_model and not packaging"

test:  ## everything but the minutes-long runs on real models
	pytest -m "not real_model"

real:  ## the main command and its control on the real default model
	pytest -m real_model
