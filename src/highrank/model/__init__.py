"""Backbones, where adapters go, the contracts of methods, adapters and what they compute with: imports `base`."""
