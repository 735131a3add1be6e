"""Pages between hosts (docs/cluster.md)."""
