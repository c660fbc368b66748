-- What \d+ and \df+ show.

COMMENT ON SEQUENCE lockstep.ticket IS
'Tickets of pushes: the integer part of their events'' positions. CACHE must stay 1.';

COMMENT ON TABLE lockstep.events IS
'The event log. Written by push_events and push_event alone; read settled events with read_events or projection_claim.';
COMMENT ON COLUMN lockstep.events.tenant IS 'Isolation unit: its writers and readers never wait for another''s. Empty where there is only one.';
COMMENT ON COLUMN lockstep.events.position IS 'Place in the log: the ticket of the push, plus the event''s index in it in steps of 0.000001.';
COMMENT ON COLUMN lockstep.events.sequence IS 'Number of the event within its aggregate: from 1, without gaps.';
COMMENT ON COLUMN lockstep.events.event_id IS 'Given by the client, so that a push can be repeated safely.';
COMMENT ON COLUMN lockstep.events.created_at IS 'Wall clock at the push; says nothing about order.';

COMMENT ON TABLE lockstep.unique_keys IS
'Values held by events'' "unique" operations: each at most once per tenant and scope, or per scope over all tenants where global.';
COMMENT ON COLUMN lockstep.unique_keys.position IS 'The event that took the key.';

COMMENT ON VIEW lockstep.tenants IS
'Each tenant that has events, with the position of its last visible event (which may not be settled yet).';

COMMENT ON TABLE lockstep.projections IS
'Projections: filter, handler and settings. Changed by projection_create, _alter, _owner and _drop.';
COMMENT ON COLUMN lockstep.projections.owner IS 'Role whose members may change the projection; its name, resolved at each use.';
COMMENT ON COLUMN lockstep.projections.handler IS 'Function that applies an event: schema-qualified, with argument types, resolved at each run.';
COMMENT ON COLUMN lockstep.projections.start_after IS 'Cursor of tenants in which the projection has not moved yet.';

COMMENT ON TABLE lockstep.projection_cursors IS
'How far each projection has come in each tenant: every matching event at or below the position has been applied.';

COMMENT ON COLUMN lockstep.projection_cursors.failing IS 'The event after the cursor has failed and is to be retried.';
COMMENT ON COLUMN lockstep.projection_cursors.retry_at IS 'Claims give no rows until then.';

COMMENT ON TABLE lockstep.projection_pauses IS
'Tenants in which a projection is paused, or runs although it is paused elsewhere.';

COMMENT ON TABLE lockstep.failed_events IS
'Events that a projection could not apply: still to be retried, or skipped (dead letters) from skipped_at on.';

COMMENT ON FUNCTION lockstep.push_events(jsonb, text) IS
'Appends the events of a JSON array atomically, in order. Keys: aggregate_type, aggregate_id, event_type; optional payload, metadata, expected_sequence, event_id, unique. Waits for pushes to the same aggregates and unique keys. Raises LS001, 23505, 22023, 22004, 54000, 40001, 55000.';
COMMENT ON FUNCTION lockstep.push_event(text, text, text, jsonb, bigint, jsonb, text) IS
'Appends one event. Waits for pushes to the same aggregate. Raises LS001, 22023, 22004, 40001, 55000.';
COMMENT ON FUNCTION lockstep.barrier(text) IS
'Waits until the tenant''s pushes in flight have ended; every event at or below the result is settled. Use it in a later statement: rows read in the same statement come from an older snapshot. Stalls no writer; obeys lock_timeout. Raises 25000, 25006.';
COMMENT ON FUNCTION lockstep.horizon(text) IS
'Position below every push of the tenant in flight; every event at or below the result is settled. Waits for nobody. Use it in a later statement: rows read in the same statement come from an older snapshot. Raises 25000, 25006.';
COMMENT ON FUNCTION lockstep.read_events(numeric, int, text[], text[], boolean, text) IS
'Settled events after a position, in order. barrier: wait for the pushes in flight (true) or read below them (false). On a standby: up to the greatest projection cursor of the tenant. Raises 25000.';
COMMENT ON FUNCTION lockstep.aggregate_events(text, text, bigint, int, text) IS
'Events of one aggregate after a sequence, in order, as the calling statement''s snapshot shows them. Waits for nobody.';
COMMENT ON FUNCTION lockstep.ticket_resync() IS
'Sets the ticket sequence above the log and returns its value. Waits for the pushes in flight; pushes wait for it until its transaction ends.';
COMMENT ON FUNCTION lockstep.after_data_loss() IS
'Raises the ticket, the ids of jobs and every token by 2^32; tokens handed out before count no more. For use once after a failover or point-in-time recovery that lost commits.';

COMMENT ON FUNCTION lockstep.projection_create(text, text[], text[], regprocedure, int, int, interval, numeric, boolean) IS
'Creates a projection owned by the caller; false if it was there and if_not_exists is true. start_after NULL: after what each tenant has settled now. Raises 42710.';
COMMENT ON FUNCTION lockstep.projection_alter(text, text[], text[], regprocedure, int, int, interval) IS
'Changes a projection; NULL keeps, ''{}'' and ''-'' clear. Waits for running claims. Raises 42704, 42501, 25000.';
COMMENT ON FUNCTION lockstep.projection_drop(text) IS
'Removes a projection and its cursors. Waits for running claims. Raises 42704, 42501, 25000.';
COMMENT ON FUNCTION lockstep.projection_owner(text, regrole) IS
'Gives a projection to another role; the caller must be a member of both. Raises 42704, 42501.';
COMMENT ON FUNCTION lockstep.projection_claim(text, int, numeric, boolean, boolean, text) IS
'Takes the projection for this transaction and returns its next events. Apply them in later statements, then call projection_advance. wait: wait for another claim (true) or return no rows (false). barrier: wait for the pushes in flight (true) or read below them (false). Raises 42704, 25000.';
COMMENT ON FUNCTION lockstep.projection_claim_state(text, text) IS
'How this transaction''s last claim of the projection went: claimed, busy, paused, backoff or none; and whether events were left.';
COMMENT ON FUNCTION lockstep.projection_advance(text, numeric, text) IS
'Moves the cursor to an event of the claimed batch (NULL: past all of it) and returns where it is. Raises LS002, 22023.';
COMMENT ON FUNCTION lockstep.projection_due(text[], int) IS
'(projection, tenant) pairs with settled events after their cursor that nobody is claiming, the longest waiting first. Waits for nobody.';
COMMENT ON FUNCTION lockstep.projection_fail(text, numeric, text, text) IS
'Counts a failure of an event of the claimed batch. retry: the cursor is just before it and claims wait; skip: it has failed max_failures times and the cursor is past it. Raises LS002, 22023.';
COMMENT ON FUNCTION lockstep.projection_run(text, int, boolean, interval, text) IS
'Claims, applies with the handler and advances, with the caller''s rights. Raises 42704, 42501, 25000, 55000.';
COMMENT ON FUNCTION lockstep.projection_wait(text, numeric, interval, text) IS
'Waits until the cursor is at or above a position: true; false at the timeout. Raises 42704, 25000.';
COMMENT ON FUNCTION lockstep.projection_reset(text, numeric, text) IS
'Puts the cursor at 0 or at a settled event. Waits for a running claim. Raises 42704, 42501, 22023, 25000.';
COMMENT ON FUNCTION lockstep.projection_pause(text, text) IS
'Makes later claims give no rows; tenant NULL: in every tenant. Raises 42704, 42501.';
COMMENT ON FUNCTION lockstep.projection_resume(text, text) IS
'Undoes projection_pause; tenant NULL: in every tenant. Raises 42704, 42501.';
COMMENT ON FUNCTION lockstep.failed_event_retry(text, numeric, text) IS
'Applies a skipped event again with the handler, with the caller''s rights; true if it succeeded. Waits for a running claim. Raises 42704, 22023, 55000, 25000.';
COMMENT ON FUNCTION lockstep.failed_event_discard(text, numeric, text) IS
'Forgets a skipped event. Waits for a running claim. Raises 42704, 22023, 55000, 25000.';

COMMENT ON SEQUENCE lockstep.token IS
'Tokens of leases, syncs and jobs, and incarnations. Shared by all, so that none is used twice. CACHE must stay 1.';
COMMENT ON TABLE lockstep.leases IS
'Leases: who holds what until when. Written by the lease functions alone.';
COMMENT ON COLUMN lockstep.leases.holder IS 'One incarnation of a process: two under one name share the token. Null after a release.';
COMMENT ON COLUMN lockstep.leases.token IS 'Grows at every acquisition, never at a renewal; a former holder''s is refused.';
COMMENT ON COLUMN lockstep.leases.expires_at IS 'End of the holder''s time; after a release, when that was.';
COMMENT ON COLUMN lockstep.leases.transitions IS 'How often it was acquired anew since it was made.';
COMMENT ON COLUMN lockstep.leases.min_hold_until IS 'Nobody else acquires it before, released or not. Null without min_hold.';
COMMENT ON COLUMN lockstep.leases.lock_delay IS 'How long it stays closed after it expired.';
COMMENT ON COLUMN lockstep.leases.stolen_from IS 'Who held it when lease_steal took it, if anybody did.';

COMMENT ON FUNCTION lockstep.lease_acquire(text, text, interval, jsonb, interval, interval) IS
'Acquires a lease for ttl unless somebody else holds it; the holder itself renews it. Waits for nobody but the same holder''s renewal or release in flight. Raises 22023, 22004.';
COMMENT ON FUNCTION lockstep.lease_renew(text, bigint, interval) IS
'Makes a held lease last for ttl (NULL: its own) from now: renewed; or expired, lost, unknown.';
COMMENT ON FUNCTION lockstep.lease_release(text, bigint) IS
'Gives a lease back: true; false if it is not held with this token.';
COMMENT ON FUNCTION lockstep.lease_guard(text, bigint) IS
'Raises LS003 unless the lease is held with this token; nobody takes it over until this transaction ends.';
COMMENT ON FUNCTION lockstep.lease_guard_at_commit(text, bigint) IS
'Makes COMMIT raise LS003 unless the lease is held with this token then. No PREPARE TRANSACTION (0A000).';
COMMENT ON FUNCTION lockstep.lease_guard_trigger() IS
'BEFORE trigger for each STATEMENT; arguments lease_name and, optionally, setting_name. Raises LS003 unless this transaction guards the lease or the setting holds its token.';
COMMENT ON FUNCTION lockstep.lease_steal(text, text, interval, text) IS
'Takes a lease from its holder, with a new token. Waits for guards, obeying lock_timeout; 55P03 names their pids.';
COMMENT ON PROCEDURE lockstep.lease_take(text, text, interval, interval, boolean, bigint, timestamptz, timestamptz) IS
'Waits until it has acquired the lease or the timeout is over, without a transaction id or a snapshot. Raises 2D000 in a transaction block.';
COMMENT ON FUNCTION lockstep.lease_delete_expired(interval) IS
'Deletes leases that have been open for at least older_than; returns how many. Tokens go on growing.';
COMMENT ON FUNCTION lockstep.lease_locks() IS
'The guards held and the sessions that wait in lease_take, from the lock table. See the view lockstep.lease_status.';
COMMENT ON VIEW lockstep.lease_status IS
'Each lease: holder, token, state, time left, how often it was acquired anew, who waits in lease_take, which transactions guard it now, when it opens.';
COMMENT ON SEQUENCE lockstep.job_id IS
'Ids of jobs. Among jobs of one priority the least is claimed first.';

COMMENT ON TABLE lockstep.jobs IS
'Jobs that are ready or in progress. Written by the job functions alone.';
COMMENT ON COLUMN lockstep.jobs.key IS 'At most one job of it is in progress. Null: no limit, no twins.';
COMMENT ON COLUMN lockstep.jobs.attempts_left IS 'Attempts after the one in progress. Null: it is retried for ever.';
COMMENT ON COLUMN lockstep.jobs.token IS 'Of the claim; a former claim''s is refused.';
COMMENT ON COLUMN lockstep.jobs.claimed_until IS 'After that another claim may take it over. Until one does, the worker still has it.';
COMMENT ON COLUMN lockstep.jobs.previous_holder IS 'Whose attempt was the last to fail or expire; last_error says how.';
COMMENT ON COLUMN lockstep.jobs.enqueued IS 'How many calls of job_enqueue it stands for.';
COMMENT ON COLUMN lockstep.jobs.slot IS 'Its place among the jobs in progress of a queue with a limit.';
COMMENT ON COLUMN lockstep.jobs.retry_id IS 'Keeps a job that failed apart from a twin that is being enqueued: its id, or 0.';
COMMENT ON COLUMN lockstep.jobs.delayed_until IS 'run_at, where that was in the future when it was written, else the epoch.';
COMMENT ON COLUMN lockstep.jobs.lane IS 'What claims read apart: a number for queue and tenant, plus 1 without a key, plus 2 when delayed. Null in progress.';

COMMENT ON TABLE lockstep.dead_jobs IS
'Dead letters: jobs whose attempts are used up, until job_requeue, job_discard or job_purge.';
COMMENT ON TABLE lockstep.queues IS
'What queue_configure, queue_pause and queue_resume said of a queue, in a tenant or in every one. Null: not said.';
COMMENT ON TABLE lockstep.queue_statistics IS
'Sums over about the last thousands of completed jobs of a queue, in seconds, in several parts. See lockstep.queue_status.';
COMMENT ON VIEW lockstep.queue_status IS
'Each queue and tenant: jobs ready, delayed, in progress, expired and dead; age of the oldest ready one; mean wait and run of completed ones.';

COMMENT ON FUNCTION lockstep.job_enqueue(text, text, text, jsonb, int, interval, int, text, text) IS
'Enqueues a job, or returns its ready twin with enqueued = false. Waits for who enqueues the same or claims the twin. Raises 22023, 22004.';
COMMENT ON FUNCTION lockstep.job_claim(text, text, int, interval, text) IS
'Claims up to max_jobs jobs for ttl, at most one of a key, expired claims included; commit before working. tenant NULL: any. Waits for nobody. Raises 22023, 22004.';
COMMENT ON FUNCTION lockstep.job_renew(bigint[], bigint[], interval) IS
'Makes claims last for ttl from now; returns the jobs still claimed with these tokens. Waits for nobody. Raises 22023, 22004.';
COMMENT ON FUNCTION lockstep.job_complete(bigint, bigint) IS
'Removes a job that is done: completed; or lost, if it is not claimed with this token (then roll back).';
COMMENT ON FUNCTION lockstep.job_fail(bigint, bigint, text, interval) IS
'Ends a failed attempt: retry, dead, or lost. retry_after NULL: exponential backoff with jitter. Raises 22023, 22004.';
COMMENT ON FUNCTION lockstep.job_guard(bigint, bigint) IS
'Raises LS007 unless the job is claimed with this token; nobody takes it over until this transaction ends.';
COMMENT ON FUNCTION lockstep.job_cancel(bigint) IS
'Removes a job that is ready or in progress; true if it was there.';
COMMENT ON FUNCTION lockstep.job_requeue(bigint) IS
'Makes a dead job ready again with all its attempts; true if it was there.';
COMMENT ON FUNCTION lockstep.job_discard(bigint) IS
'Deletes a dead job; true if it was there.';
COMMENT ON FUNCTION lockstep.job_purge(interval, text) IS
'Deletes the jobs that have been dead for at least older_than; returns how many. tenant NULL: every one. Raises 22023, 22004.';
COMMENT ON FUNCTION lockstep.job_reap(text) IS
'Ends expired claims: ready again, merged or dead; returns how many. tenant NULL: every one. Waits for nobody. Raises 22023.';
COMMENT ON PROCEDURE lockstep.job_wait(text, interval, boolean, text) IS
'Waits until a claim would give a job or the timeout is over, without a transaction id or a snapshot. Raises 2D000 in a transaction block.';
COMMENT ON FUNCTION lockstep.queue_configure(text, int, interval, interval, text) IS
'Sets a queue''s limit of jobs in progress (0: none, -1: lockstep.max_jobs_in_progress) and backoff; NULL keeps. tenant NULL: every one. Raises 22023, 22004.';
COMMENT ON FUNCTION lockstep.queue_pause(text, text) IS
'Makes later claims of the queue give no jobs. tenant NULL: every one. Raises 22023, 22004.';
COMMENT ON FUNCTION lockstep.queue_resume(text, text) IS
'Undoes queue_pause. tenant NULL: every one. Raises 22023, 22004.';

COMMENT ON FUNCTION lockstep.writer_locks() IS
'The pushes in flight, from the lock table. See the view lockstep.writers.';
COMMENT ON FUNCTION lockstep.projection_locks() IS
'The claims held, from the lock table. See the view lockstep.projection_status.';
COMMENT ON VIEW lockstep.writers IS
'The pushes in flight: tenant (null if none of its events is visible yet), pid or, of a prepared transaction, gid, start of the transaction, and the least position that its events can have.';
COMMENT ON VIEW lockstep.projection_status IS
'Each projection in each tenant: how far it is, how far behind (events that pass its filter among at most 10,000 after the cursor), what it is doing and for whom it waits, failures of the event being retried, events skipped, the last error.';

COMMENT ON FUNCTION lockstep.workers() IS
'This database''s workers, from shared memory. See the view lockstep.worker_status.';
COMMENT ON FUNCTION lockstep.workers_are_on() IS
'Whether workers run in this database: the library is preloaded and lockstep.databases names it.';
COMMENT ON VIEW lockstep.worker_status IS
'This database''s workers: role, what each is doing and for how long, its batches, events, events per second over the last 10 seconds, errors, and restarts after it ended without being told to. Counts are since the server''s start.';

COMMENT ON SEQUENCE lockstep.token IS
'Tokens of leases, syncs and jobs, and incarnations. Shared by all, so that none is used twice. CACHE must stay 1.';

COMMENT ON TABLE lockstep.resources IS
'Resources of the generation registry, and tombstones of deleted ones. Changed by resource_create, generation_increment and their like.';
COMMENT ON COLUMN lockstep.resources.incarnation IS 'Drawn at each creation: calls that name another one say gone.';
COMMENT ON COLUMN lockstep.resources.generation IS 'Grows with each change; a replica at it is current.';
COMMENT ON COLUMN lockstep.resources.changed_at IS 'When the generation was raised, or the resource created or deleted.';
COMMENT ON COLUMN lockstep.resources.deleted_at IS 'Of a tombstone: since when.';

COMMENT ON TABLE lockstep.replicas IS
'What each replica of a resource holds, and who is syncing it. Changed by replica_sync_begin, replica_sync_finish and their like.';
COMMENT ON COLUMN lockstep.replicas.generation IS 'What the replica holds; null: nothing.';
COMMENT ON COLUMN lockstep.replicas.synced_at IS 'When the generation was recorded.';
COMMENT ON COLUMN lockstep.replicas.due_at IS 'From when on the replica wants a sync; null: it is current.';
COMMENT ON COLUMN lockstep.replicas.sync_token IS 'The claim of the sync under way, if there is one.';
COMMENT ON COLUMN lockstep.replicas.sync_generation IS 'What the sync under way will have brought: the resource''s generation at its beginning.';
COMMENT ON COLUMN lockstep.replicas.sync_source IS 'The replica that the sync under way copies from; null: the truth lives elsewhere.';
COMMENT ON COLUMN lockstep.replicas.sync_source_lost IS 'That source was taken out, or forced to an older generation, since the sync began.';
COMMENT ON COLUMN lockstep.replicas.retry_count IS 'Failures since the last success.';
COMMENT ON COLUMN lockstep.replicas.retry_at IS 'No sync begins before.';
COMMENT ON COLUMN lockstep.replicas.missing_at_source IS 'The last sync found nothing at the source.';

COMMENT ON FUNCTION lockstep.resource_create(text, text[], text) IS
'Creates a resource at generation 0, held by the replicas, and returns its incarnation. Raises 42710.';
COMMENT ON FUNCTION lockstep.resource_delete(text, text) IS
'Deletes a resource and its replicas and leaves a tombstone: what comes late says gone. False: there was none.';
COMMENT ON FUNCTION lockstep.resource_purge(interval, text) IS
'Removes tombstones that are at least so old and have no live claim; returns their number. Raises 25000.';
COMMENT ON FUNCTION lockstep.generation_increment(text, text[], text) IS
'Adds one to a resource''s generation and returns it. replicas NULL: the truth elsewhere has changed; else the current ones among them follow. Raises LS005, 42704.';
COMMENT ON FUNCTION lockstep.generation_set(text, text, bigint, bigint, boolean, text) IS
'Records what a replica holds: applied, unchanged, downgrade (refused) or gone. Raises 42704.';
COMMENT ON FUNCTION lockstep.generation_replicated(text, text, text, text) IS
'The generation that the target will hold after a copy from the source; null: the source holds nothing. Raises LS004, 42704.';
COMMENT ON FUNCTION lockstep.generation_current(text, text) IS
'The replicas at the resource''s generation. Raises 42704.';
COMMENT ON FUNCTION lockstep.replica_make_authoritative(text, text, text) IS
'Gives the resource a new generation that only this replica holds, and returns it. Raises 42704.';
COMMENT ON FUNCTION lockstep.replica_delete(text, text, text) IS
'Takes a replica out. False: it was not there.';
COMMENT ON FUNCTION lockstep.replica_invalidate(text, text, text) IS
'Takes out a replica whose content proved bad; the resource is deleted with its last one. False: it was not there.';
COMMENT ON FUNCTION lockstep.replica_sync_begin(text, text, text, text, interval, text) IS
'Begins a sync: started (with token and generation), current, busy, backoff or gone. A named source must be current. Raises LS006, 42704.';
COMMENT ON FUNCTION lockstep.replica_sync_renew(text, text, bigint, interval, text) IS
'Keeps a sync''s claim live for ttl from now. False: it is no longer the caller''s.';
COMMENT ON FUNCTION lockstep.replica_sync_finish(text, text, bigint, text, boolean, text) IS
'Ends a sync: current, outdated (sync again), failed, missing, source_lost, lost or gone. Judges by what is there after its wait.';
COMMENT ON FUNCTION lockstep.replicas_due(int, text) IS
'Picks replicas that want a sync, the longest due first; nobody else picks them until the transaction ends. Waits for nobody. Raises 25000.';
COMMENT ON FUNCTION lockstep.replica_sync_claim(text, int, interval, text) IS
'Picks replicas that want a sync and begins their syncs. Waits for nobody. Raises 25000.';
COMMENT ON FUNCTION lockstep.registry_follow(text, text, text[], text) IS
'Does to the registry what an event says: created, incremented, deleted, gone or ignored. For a projection''s handler.';
COMMENT ON VIEW lockstep.replica_status IS
'Each replica: current, syncing, backoff, missing, outdated, or gone (the claim that keeps a tombstone); how far behind, since when a sync is wanted, who is syncing, what failed.';
COMMENT ON VIEW lockstep.resource_status IS
'Each resource: whether all, some (partly) or no replicas are current, or gone (a tombstone); their numbers.';
