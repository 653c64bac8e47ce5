"""Floor 6: compare the fast path with the float32 reference: layers, steps and images."""
