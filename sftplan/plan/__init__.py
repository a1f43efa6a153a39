"""The plan: one frozen record, and its file."""
