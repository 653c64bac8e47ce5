"""Floor 1: files on disk: atomic writes; PNG and labelled grids; the published sample archives."""
