-- KEYS: the worker's status. ARGV: facts, as JSON.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[1], cjson.encode({now, ARGV[1]}))
