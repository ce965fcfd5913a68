-- KEYS: lease, pointer. ARGV: fence, counter, sha256. Returns 1, or 0 when a newer fence was given out.
if tonumber(redis.call('HGET', KEYS[1], 'fence') or 0) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[2], 'fence', ARGV[1], 'counter', ARGV[2], 'sha256', ARGV[3])
return 1
