"""Reads runs and sweeps: tables, figures, one page, TensorBoard: imports `train` and below."""
