-- The version of these objects, by which a library knows whether it works with them: see src/schema.rs, which reads the number out of
-- the body. An upgrade script that changes what the library builds on replaces this function, before anything else.
CREATE FUNCTION lockstep.schema_version() RETURNS integer
LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER
SET search_path = pg_catalog, lockstep, pg_temp
AS 'SELECT 1';
