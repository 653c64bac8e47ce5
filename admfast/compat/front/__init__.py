"""Folder with the published names, to be put first on `sys.path`; see `admfast.compat`."""
