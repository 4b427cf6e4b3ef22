"""What the device decides: every `auto` of the config, the kernels it has, the loops it unrolls."""
