"""What the scanner, the index and the merger share: configuration, logs, serving, secrets."""
