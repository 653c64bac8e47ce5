"""Every op of the package at ADM's shapes: ours beside eager PyTorch, torch.compile and other libraries."""
