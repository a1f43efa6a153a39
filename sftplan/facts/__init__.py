"""What is given: model, hardware, workload, strategy. Frozen values, no behaviour but validation."""
