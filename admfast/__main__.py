"""`python -m admfast` is the command line."""

from admfast.cli.main import main

raise SystemExit(main())
