"""Tasks and their sources, protocols, from examples to batches, from outputs to scores: imports `base`."""
