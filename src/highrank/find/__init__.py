"""Finds methods, tasks, runs, the word to type, and what is wrong with a machine: imports `train` and below."""
