-- Who holds these keys. KEYS: shard. ARGV: the live hosts' numbers, keys (packed). Answers packed
-- pairs of little-endian u16: the key's number in this call, a holder's number.

local live, keys = holders(ARGV[1]), ARGV[2]
local answer = {}

load_shard()
each_key(keys, function(at, number, contents)
  local key, value = sub(keys, at, at + KEY - 1), contents[number]
  local found = entry_at(value, key, 1)
  while found do
    local holder = sub(value, found + KEY, found + KEY + 1)
    if live[holder] then
      answer[#answer + 1] = struct.pack('<I2', (at - 1) / KEY) .. holder
    end
    found = entry_at(value, key, found + ENTRY)
  end
end, function() end)
return table.concat(answer)
