"""The index: the cluster's map from fingerprint to the hosts that hold such a page, in Redis."""
