"""Floor 7: the command line: thin commands over the floors below."""

from admfast import _interrupt

_interrupt.begin()  # until `main` takes over: the commands are still to be imported
