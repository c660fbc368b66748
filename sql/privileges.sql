-- Nothing for PUBLIC: who may do what is granted function by function (see the README's recipes).
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA lockstep FROM PUBLIC;
REVOKE ALL ON ALL PROCEDURES IN SCHEMA lockstep FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA lockstep FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA lockstep FROM PUBLIC;
REVOKE ALL ON SCHEMA lockstep FROM PUBLIC;

-- No function is STRICT; pgrx makes those without arguments so.
ALTER FUNCTION lockstep.ticket_resync() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.after_data_loss() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.writer_locks() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.projection_locks() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.workers() CALLED ON NULL INPUT;
ALTER FUNCTION lockstep.workers_are_on() CALLED ON NULL INPUT;
