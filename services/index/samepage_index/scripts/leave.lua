-- A host takes its leave: whoever announces its name next is not another host. Its lease goes on,
-- since its memory does. ARGV: name, its number.

local record = call('HGET', hosts, ARGV[1])
if record and parse(record).number == ARGV[2] then
  call('HSET', past, ARGV[1], '1' .. sub(call('HGET', past, ARGV[1]), 2))
end
return true
