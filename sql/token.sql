-- Tokens: what fences a lease, a sync or a job, and the incarnations of resources. Each is drawn under the lock of its object.

-- CACHE 1: a cached value would be less than one that another session has drawn meanwhile.
CREATE SEQUENCE lockstep.token AS bigint CACHE 1 NO CYCLE;

SELECT pg_catalog.pg_extension_config_dump('lockstep.token', '');
