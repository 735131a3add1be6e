-- A host is alive. ARGV: name, its number, lease in ms. Answers the numbers of all live hosts
-- (packed), or nil when the index does not have what this host published.

local record, run = call('HGET', hosts, ARGV[1]), run_id()
local known = record and parse(record)
if not known or known.number ~= ARGV[2] or known.run ~= run then return false end
local now = now_ms()
call('ZADD', leases, text(now + ARGV[3]), ARGV[2])
local found = {}
for i, host in ipairs(live_hosts(now, run)) do found[i] = host.number end
return table.concat(found)
