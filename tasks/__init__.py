"""The tasks, one file each: their data, answers and scores."""
