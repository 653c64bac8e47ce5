"""The measurements of each operation: `ceilings` by torch only, `kernels` by this package beside torch."""
