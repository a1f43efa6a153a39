"""Which strategy to train with: enumerate, prune, rank, and say what else there was."""
