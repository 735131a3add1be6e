-- What the scripts on hosts have in common; it is put before each of them.
--
-- KEYS[1], hosts: hash, name -> 2-byte number, 8-byte epoch, 40-byte run id, merger's address.
-- KEYS[2], leases: sorted set, number -> when the lease ends (ms since 1970, this server's clock).
-- KEYS[3], numbers: hash, number -> '0', or since when no host has it any more (ms). A number is
-- used again only after the entries that carry it were swept.
-- KEYS[4], past: hash, name -> '1' when the host has taken its leave, else '0', and the 8-byte epoch
-- that it announced before.
-- The run id is of the server processes that took the host's entries: one that starts again may have
-- old data, or none. It is made of this server's and of the last argument, which is the generation
-- of a cluster's other servers.

local sub = string.sub
local call = redis.call
local hosts, leases, numbers, past = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function run_id()
  local own = string.match(call('INFO', 'server'), 'run_id:(%x+)')
  return redis.sha1hex(own .. ARGV[#ARGV])
end

local function text(number)
  return string.format('%.0f', number)
end

local function parse(record)
  return {
    number = sub(record, 1, 2), epoch = sub(record, 3, 10), run = sub(record, 11, 50),
    address = sub(record, 51),
  }
end

-- The hosts that have a lease and whose entries this server has.
local function live_hosts(now, run)
  local remaining, live = {}, {}
  local found = call('ZRANGEBYSCORE', leases, '(' .. text(now), '+inf', 'WITHSCORES')
  for i = 1, #found, 2 do remaining[found[i]] = found[i + 1] - now end
  local all = call('HGETALL', hosts)
  for i = 1, #all, 2 do
    local known = parse(all[i + 1])
    if known.run == run and remaining[known.number] then
      live[#live + 1] = {
        name = all[i], record = all[i + 1], number = known.number,
        remaining = remaining[known.number],
      }
    end
  end
  return live
end
