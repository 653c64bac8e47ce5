"""Floor 7: the command line, thin commands over the lower floors."""
