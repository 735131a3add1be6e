"""`samepage top`: who shares and saves what, live."""
