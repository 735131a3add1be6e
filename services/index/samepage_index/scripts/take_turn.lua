-- One janitor at a time. KEYS: turn. ARGV: who asks, for how long (ms). Answers 1 when it has the
-- turn, for that long from now.

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
