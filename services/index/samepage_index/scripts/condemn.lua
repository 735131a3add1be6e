-- Whose entries can be swept. ARGV: for how long after its lease a host is kept (ms), how many
-- numbers at most. Forgets the hosts whose time is up, and answers numbers that no host has
-- (packed).

local now, keep_ms, most = now_ms(), tonumber(ARGV[1]), tonumber(ARGV[2])
local all = call('HGETALL', hosts)
for i = 1, #all, 2 do
  local number = parse(all[i + 1]).number
  local ends = call('ZSCORE', leases, number)
  if not ends or ends + keep_ms <= now then
    call('HDEL', hosts, all[i])
    call('HDEL', past, all[i])
    call('ZREM', leases, number)
    call('HSET', numbers, number, '1')
  end
end
local found = {}
local states = call('HGETALL', numbers)
for i = 1, #states, 2 do
  if #found == most then break end
  local since = tonumber(states[i + 1])
  if since ~= 0 and since + keep_ms <= now then found[#found + 1] = states[i] end
end
return table.concat(found)
