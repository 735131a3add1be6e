-- The hosts with a lease. Answers name, record, remaining ms, name, ...

local answer = {}
for _, host in ipairs(live_hosts(now_ms(), run_id())) do
  answer[#answer + 1] = host.name
  answer[#answer + 1] = host.record
  answer[#answer + 1] = host.remaining
end
return answer
