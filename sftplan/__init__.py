"""sftplan plans, verifies and launches the supervised fine-tuning of a language model."""

__version__ = "0.1.0"
