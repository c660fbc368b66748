-- Tokens of leases, syncs and jobs, and incarnations of resources: one sequence for all, so that none is used twice, after
-- deletion of what it belonged to neither. CACHE 1: a cached value would be handed out after a greater one.
CREATE SEQUENCE lockstep.token AS bigint CACHE 1 NO CYCLE;

SELECT pg_catalog.pg_extension_config_dump('lockstep.token', '');
