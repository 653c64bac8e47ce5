"""The measurements of each operation: `ceilings` with torch only, `kernels` with this package and torch."""
