"""Adapters and models in the formats of other libraries."""
