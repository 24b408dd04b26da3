"""What training changed in the weights: imports `report` and below, but not `interop`."""
