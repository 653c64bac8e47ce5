"""Floor 6: sample many images into a folder, by any number of processes, and collect them."""
