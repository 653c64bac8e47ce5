"""`admfast app`: a local web page that samples, compares, enlarges and restores images."""
