"""Stand in for what programs import beside the published package; see `admfast.compat`."""
