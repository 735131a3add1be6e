"""`python -m samepage.cli` is the `samepage` command."""

from samepage.cli import main

main()
