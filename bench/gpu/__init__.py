"""One command for everything that needs a GPU, within a given time."""
