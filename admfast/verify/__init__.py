"""Floor 6: the fast path against the float32 reference: layers, steps and images."""
