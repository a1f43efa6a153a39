"""One training step as a tape of events: memory that comes and goes, work that is done."""
