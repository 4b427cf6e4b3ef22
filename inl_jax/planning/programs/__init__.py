"""What XLA makes of a step: flags, the cache, compiling without a device, collectives."""
