"""The scanner: one a host; looks at arenas, finds equal pages, tells the merger and the index."""
