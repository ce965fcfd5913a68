-- KEYS: statuses of workers, each a list of one entry. An empty one says that its worker has not reported yet.
for _, key in ipairs(KEYS) do
    if redis.call('TYPE', key).ok ~= 'list' then
        redis.call('DEL', key)
        redis.call('RPUSH', key, '')
    end
end
