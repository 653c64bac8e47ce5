"""Run the command line as `python -m admfast`."""

from admfast.cli.main import main

raise SystemExit(main())
