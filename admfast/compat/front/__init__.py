"""The published names, for the front of the path; see `admfast.compat`."""
