"""The merger: one a host; owns the store and the books, and orders the agents."""
