"""Many runs of one grid, where they execute, the search for a learning rate: imports `report`, `find` and below."""
