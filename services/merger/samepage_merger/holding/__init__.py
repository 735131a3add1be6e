"""`samepage-arenas`: a process that holds arenas for gRPC clients that cannot map memory.

It uses the client library like any application, and needs no privilege.
"""
