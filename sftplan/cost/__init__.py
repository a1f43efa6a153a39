"""What a step costs: memory, time, money. Arithmetic only."""
