"""What sharing would save, before anything is changed: reads the memory of any process.

Read-only: /proc/PID/maps and pagemap say which pages there are, process_vm_readv(2) reads them,
and their fingerprints (with a random seed that is forgotten) are compared. 41 bytes a page are kept
while that goes on: fingerprint, frame, mapping, number, kind and leader. Needs numpy, as the extra
`services` brings it.
"""
