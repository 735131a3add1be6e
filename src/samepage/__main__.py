"""`python -m samepage` is the `samepage` command."""

from samepage.cli import main

main()
