"""What only Kubernetes needs: the device plugin, and the webhook."""
