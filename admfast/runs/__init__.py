"""Floor 6: sample many images into a folder."""
