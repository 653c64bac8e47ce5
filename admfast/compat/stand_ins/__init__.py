"""Stand-ins for other packages that programs of the published package import; see `admfast.compat`."""
