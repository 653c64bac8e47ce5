"""What programs import beside the published package, for the end of the path; see `admfast.compat`."""
