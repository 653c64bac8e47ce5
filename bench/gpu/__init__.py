"""Everything that needs a GPU, in one command that knows how long it may take."""
