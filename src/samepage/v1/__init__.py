"""Generated from proto/samepage/v1 by `make proto`; do not edit."""
