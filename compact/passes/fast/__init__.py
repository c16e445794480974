"""Forms of linear layers, LoRA and RMSNorm that use less time and memory on CPUs."""
