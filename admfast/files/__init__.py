"""Floor 1: files on disk: atomic writes, images, labelled grids, and the published sample archives."""
