"""Floor 1: files on disk: atomic writes, images, labelled grids, the published sample archives, downloads."""
