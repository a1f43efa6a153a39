"""What this machine has: GPUs by NVML, memory and processors by the operating system."""
