"""From words to a checked run: imports `base`, `model` and `data`."""
