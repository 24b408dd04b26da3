"""HighRank: parameter-efficient fine-tuning methods, each in one file, compared fairly."""

__version__ = "0.1.0"
