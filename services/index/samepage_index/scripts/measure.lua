-- Size of a shard. KEYS: shard. Answers entries, distinct keys, bytes of memory.

load_shard()
return { entries, distinct, call('MEMORY', 'USAGE', shard, 'SAMPLES', 0) or 0 }
