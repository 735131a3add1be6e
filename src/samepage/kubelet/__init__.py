"""Generated from proto/samepage/kubelet by `make proto`; do not edit."""
