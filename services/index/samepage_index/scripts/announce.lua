-- A host says who it is. ARGV: name, epoch (8 bytes), merger's address, lease in ms, a number to
-- begin the search for a free one at. Answers its number, and 1 when the index still has what this
-- epoch published.

local name, epoch, address, lease_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local NUMBERS = 65536

local function free_number()
  for try = 0, NUMBERS - 1 do
    local number = struct.pack('<I2', (ARGV[5] + try) % NUMBERS)
    if call('HSETNX', numbers, number, '0') == 1 then return number end
  end
  return nil
end

local now, run = now_ms(), run_id()
local record = call('HGET', hosts, name)
local known = record and parse(record)
local resumed = known and known.epoch == epoch and known.run == run
local number = resumed and known.number or free_number()
if not number then return redis.error_reply('NUMBERS all 65536 host numbers are in use') end
if known and not resumed then
  call('ZREM', leases, known.number)
  call('HSET', numbers, known.number, text(now))
end
call('HSET', hosts, name, number .. epoch .. run .. address)
call('ZADD', leases, text(now + lease_ms), number)
return { number, resumed and 1 or 0 }
