"""Floor 6: many images into a folder."""
