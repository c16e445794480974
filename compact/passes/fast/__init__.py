"""Linear layers, LoRA and RMSNorm, computed with less time and memory on CPUs."""
