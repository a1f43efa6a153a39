"""The real masked fine-tuning run of a plan."""
