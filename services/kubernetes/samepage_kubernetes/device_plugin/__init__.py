"""The device plugin: gives containers that ask for it /dev/userfaultfd, without privileges."""
