"""Floor 5: from a request to images, and what a user holds."""
