"""What is computed: the integrator, its gradient, the blocks, the language model, the loss."""
