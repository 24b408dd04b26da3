"""Plan, model, training, evaluation, and what a run leaves: imports `config` and below."""
