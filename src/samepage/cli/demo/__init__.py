"""`samepage demo`: two hosts on this machine share the memory of six workers.

`command` is the order of events; `files` finds what to load, `worker` is a worker's process,
`workers` its parent's end, `measure` asks the kernel, `report` tells.
"""
