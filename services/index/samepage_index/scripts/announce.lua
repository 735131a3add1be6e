-- A host says who it is. ARGV: name, epoch (8 bytes), merger's address, lease in ms, a number to
-- begin the search for a free one at. Answers its number, and 1 when the index still has what this
-- epoch published; or nil, the ms left of the lease that another host has under this name, and that
-- host's address.
--
-- Who comes with a new epoch and the same address has started anew, and with another address has
-- moved, or is another host: then the lease has to end first, by itself or by a leave. Two hosts
-- with one address show by an epoch that comes back after it was replaced.

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
local before = call('HGET', past, name) or ('0' .. string.rep('\0', 8))
local left, former = sub(before, 1, 1) == '1', sub(before, 2)
local remaining = known and known.run == run
  and (call('ZSCORE', leases, known.number) or 0) - now or 0
if remaining > 0 and not resumed and not left
  and (known.address ~= address or former == epoch) then
  return { false, remaining, known.address }
end
local number = resumed and known.number or free_number()
if not number then return redis.error_reply('NUMBERS all 65536 host numbers are in use') end
if known and not resumed then
  call('ZREM', leases, known.number)
  call('HSET', numbers, known.number, text(now))
end
call('HSET', hosts, name, number .. epoch .. run .. address)
call('HSET', past, name, '0' .. (known and known.epoch ~= epoch and known.epoch or former))
call('ZADD', leases, text(now + lease_ms), number)
return { number, resumed and 1 or 0 }
