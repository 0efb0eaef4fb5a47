"""The lower level: train y at fixed x, and both levels' values and gradients at trained weights. No Ray."""
