"""Files, processes, errors, names and the terminal: imports nothing else of ours."""
