-- Delete the entries of hosts that are gone, in some of the buckets. KEYS: shard. ARGV: the hosts'
-- numbers (packed), first bucket, how many. Answers how many buckets there are, merges so far,
-- entries deleted, and 1 when the shard still has more buckets than it needs.
-- Begun behind the last bucket, it tidies up: it merges as many buckets as it may look at.

local numbers, first, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

load_shard()
if entries == 0 then return { 0, merges, 0, 0 } end
local before = entries

local function sweep(value)
  for n = 1, #numbers, 2 do
    local holder = sub(numbers, n, n + 1)
    local at = find(value, holder, 1, true)
    while at do
      if at % ENTRY == KEY + 1 then
        local key = sub(value, at - KEY, at - 1)
        value = without(value, at - KEY)
        entries = entries - 1
        if not entry_at(value, key, 1) then distinct = distinct - 1 end
        at = find(value, holder, at - KEY, true)
      else
        at = find(value, holder, at + 1, true)
      end
    end
  end
  return value
end

local last = math.min(first + count, buckets) - 1
if first <= last then
  local fields = {}
  for number = first, last do fields[#fields + 1] = field(number) end
  local changed = {}
  for i, value in ipairs(call('HMGET', shard, unpack(fields))) do
    if value then
      local swept = sweep(value)
      if #swept < #value then changed[first + i - 1] = swept end
    end
  end
  write(changed)
else
  shrink(count)
end
if entries < before or first > last then save_shard() end
return { buckets, merges, before - entries, sparse() and 1 or 0 }
