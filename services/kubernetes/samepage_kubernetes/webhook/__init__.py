"""The webhook: gives pods that ask for it the sockets, a token and the environment."""
