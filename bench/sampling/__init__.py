"""The guided step of every preset, and the image that is made of it, beside others that compute the same."""
