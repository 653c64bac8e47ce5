"""Floor 5: sample images on request; the `Pipeline` that a user works with."""
