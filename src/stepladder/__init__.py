"""Stepladder: fine-tuning that scales without surprises."""

__version__ = "0.1.0"
