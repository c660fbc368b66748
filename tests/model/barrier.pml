/*
 * The protocol of the event log and the projections: sessions that push, sessions that read, and sessions that do both in one
 * transaction, in every interleaving. src/lock.rs says in prose what this says for spin; each step names where it is in Rust.
 *
 * A ticket is a number from 1; a set of events is a set of bits, that of ticket t is 1 << (t - 1). A push is one event here: the
 * fraction of a position only orders what commits at once.
 *
 * A -D on spin's command line chooses the bounds (WRITERS, READERS, BOTH, TRANSACTIONS, PUSHES, PREPARES) and at most one mutant, which
 * breaks one step. test_model.py runs them all.
 */

#ifndef WRITERS
#define WRITERS 2 /* sessions that push */
#endif
#ifndef READERS
#define READERS 1 /* sessions that claim, for ever */
#endif
#ifndef BOTH
#define BOTH 1 /* sessions that push and claim in one transaction */
#endif
#ifndef TRANSACTIONS
#define TRANSACTIONS 1 /* of each session that pushes; with PREPARES of the first, and one of the others */
#endif
#ifndef PUSHES
#define PUSHES 2 /* in one transaction, at most; at most 16 tickets are drawn in all */
#endif
#ifndef PREPARES
#define PREPARES 0 /* 1: transactions may be prepared, one at a time */
#endif

#define SESSIONS (WRITERS + READERS + BOTH)
#define ENTRIES (SESSIONS + PREPARES) /* in the array of processes: what is prepared has one too, without a process */
#define PREPARED SESSIONS
#define PROJECTIONS 2 /* the second wants only events with odd tickets */
#define AGGREGATES (2 + PREPARES) /* session n pushes to n modulo 2; with PREPARES the first one to another in each transaction */
#define NOBODY 255

#define SET short
#define BIT(n) (1 << (n))
#define EVENT(ticket) BIT((ticket) - 1)
#define UP_TO(ticket) (BIT(ticket) - 1)
#define FIRST(set) ((set) & -(set))
#define WANTED(p) ((p) == 0 -> 65535 : 21845)

/* The greatest ticket in a set; 0 if it is empty. */
#define LAST(set) LAST16((set) & 65535)
#define LAST16(set) ((set) >= 256 -> 8 + LAST8((set) >> 8) : LAST8(set))
#define LAST8(set) ((set) >= 16 -> 4 + LAST4((set) >> 4) : LAST4(set))
#define LAST4(set) ((set) >= 4 -> 2 + LAST2((set) >> 2) : LAST2(set))
#define LAST2(set) ((set) >= 2 -> 2 : (set))

/* What the server keeps. */
byte ticket;                        /* lockstep.ticket: the last one drawn, whatever becomes of its transaction */
SET visible;                        /* the events that a snapshot taken now shows */
byte cursor[PROJECTIONS];           /* lockstep.projection_cursors, as a snapshot taken now shows it */
byte logged_cursor[PROJECTIONS];    /* the same by the commit records in the WAL: what a standby may show already */

/* The locks, in the lock table. */
byte writers;                       /* WRITER: the sessions that hold it */
byte start[ENTRIES];                /* WRITER_START: one more than the value that it carries; 0: not held */
byte aggregate[AGGREGATES];         /* AGGREGATE: who holds it */
byte claimed[PROJECTIONS];          /* PROJECTION: who holds it */
byte running;                       /* the transactions that GetLockConflicts would name */
byte number[ENTRIES];               /* of the transaction among those of its process; what is prepared keeps it; 0: none */
byte waits_for[SESSIONS];           /* the transactions whose ends a barrier still waits for */
byte prepared_by = NOBODY;
#if PREPARES
bool is_prepared;                   /* its process has let go of it */
SET prepared_events;
byte prepared_pushes, prepared_sequence, prepared_aggregate;
#endif
#ifdef QUEUEING_BARRIER
bool queued;                        /* an exclusive request for WRITER stands in its queue */
#endif

/* What the assertions compare with. */
SET applied[PROJECTIONS];           /* what committed claims have read */
byte length[AGGREGATES];            /* committed events; the next sequence is one more */
byte head[AGGREGATES];              /* the last one's ticket */

/* REACHES, a condition that must come true in some run, so that the assertions are not met by a model that does nothing. */
#ifdef REACHES
#define WITNESS() assert(!(REACHES))
#else
#define WITNESS() skip
#endif

/*
 * With LIVENESS: what is promised to happen. The first writer may never end its transaction (spin's fairness lets who loops have its
 * turns); nobody rolls back, and there is one projection to claim, so that a reader makes progress at each turn.
 */
#ifdef LIVENESS
bool wants_writer[SESSIONS];
byte ended;
#define WANTS_WRITER(it) wants_writer[me] = it
ltl a_push_gets_the_writers_lock { [] (wants_writer[1] -> <> !wants_writer[1]) }
ltl what_is_committed_is_read { [] (ended == WRITERS + BOTH -> <> (applied[0] == visible)) }
#else
#define WANTS_WRITER(it)
#endif

/*
 * A push: src/event_log/push.rs, push(). The steps before the first lock touch nothing that others see.
 */
inline lock_aggregate() { /* lock::acquire_sorted(tags(..)): waits for other pushes, and so before WRITER is held */
    do
    :: aggregate[pushes_to] == me -> break
    :: atomic { aggregate[pushes_to] == NOBODY -> aggregate[pushes_to] = me; has_aggregate = true }
    :: else ->
        assert(mine || !(writers & BIT(me))); /* a push waits for nobody while it is in flight for the readers */
        aggregate[pushes_to] == NOBODY
    od
}

inline read_sequence() { /* read_sequences(): At::Latest */
    sequence = length[pushes_to]
}

inline lock_writer() { /* lock_writer(): once per transaction; reads TICKET.value(), then WRITER_START, then WRITER */
    if
    :: !(writers & BIT(me)) ->
        before = ticket;
#ifndef START_AFTER_TICKET
        start[me] = before + 1;
#endif
        WANTS_WRITER(true);
#ifdef QUEUEING_BARRIER
        atomic { !queued -> writers = writers | BIT(me); WANTS_WRITER(false) };
#else
        d_step { writers = writers | BIT(me); WANTS_WRITER(false) }; /* nobody ever holds or asks for it exclusively */
#endif
        has_writer = true
    :: else
    fi
}

inline draw() { /* sequence::TICKET.next(): CACHE 1 */
#ifdef CACHED_TICKETS
    atomic {
        if
        :: cached -> drawn = cached; cached = 0
        :: else -> drawn = ticket + 1; cached = ticket + 2; ticket = ticket + 2
        fi
    }
#else
    atomic { ticket++; drawn = ticket }
#endif
}

inline insert() { /* insert(): rows that nobody else sees yet */
    d_step { mine = mine | EVENT(drawn); pushed++; pushes_made++; WITNESS() }
}

inline push() {
#ifdef SEQUENCE_BEFORE_LOCK
    read_sequence();
    lock_aggregate();
#else
#ifdef WRITER_BEFORE_AGGREGATE
    lock_writer();
#endif
    lock_aggregate();
    if
    :: pushed == 0 -> read_sequence()
    :: else
    fi;
#endif
#ifdef TICKET_BEFORE_LOCK
    draw();
    lock_writer();
#else
    lock_writer();
    draw();
#endif
#ifdef START_AFTER_TICKET
    if
    :: start[me] == 0 -> start[me] = drawn
    :: else
    fi;
#endif
    insert();
    if
    :: true
#ifndef LIVENESS
    :: roll_back_to_savepoint()
#endif
    fi;
    d_step { has_aggregate = false; has_writer = false; drawn = 0; before = 0 }
}

/* ROLLBACK TO a savepoint set before this push: its rows, and the locks that it took first (lock.rs, LockOwner). */
inline roll_back_to_savepoint() {
    d_step {
        mine = mine & ~EVENT(drawn);
        pushed--;
#ifdef SAVEPOINT_RELEASES_ALL
        has_writer = true;
#endif
        if
        :: has_writer -> writers = writers & ~BIT(me); start[me] = 0
        :: else
        fi;
        if
        :: has_aggregate -> aggregate[pushes_to] = NOBODY
        :: else
        fi
    }
}

/*
 * A claim: src/projection/claim.rs, claim().
 */
inline cut_log() { /* sequence::TICKET.value(), in settle.rs */
    cut = ticket
}

inline list_writers() { /* lock.rs, WaitForLockers: GetLockConflicts lists, under one partition's lock */
    waits_for[me] = writers & running & ~BIT(me)
}

inline wait_for_writers() { /* lock.rs, wait_for_writers(): VirtualXactLock for each of the list, with no request for WRITER */
#ifdef QUEUEING_BARRIER
    queued = true;
    atomic { (writers & ~BIT(me)) == 0 -> queued = false }
#else
    list_writers();
    waits_for[me] == 0
#endif
}

inline copy_lock_table() { /* table.rs, Locks::now(): all partitions at one moment */
    d_step {
        least = NOBODY;
        other = 0;
        do
        :: other < ENTRIES ->
            if
            :: other != me && start[other] && start[other] - 1 < least -> least = start[other] - 1
            :: else
            fi;
            other++
        :: else -> break
        od;
        other = 0
    }
}

/* table.rs, writer_starts(): the holders of WRITER, with their numbers; of each the start; whether its process is still in it. */
inline find_starts() {
    d_step {
        least = NOBODY;
        is_sure = true;
        holders = writers & running & ~BIT(me);
        process_of_prepared = prepared_by;
        other = 0;
        do
        :: other < ENTRIES -> listed[other] = (holders & BIT(other) -> number[other] : 0); other++
        :: else -> break
        od;
        other = 0
    };
    do
    :: other < ENTRIES && !(holders & BIT(other)) -> other++
    :: other < ENTRIES && (holders & BIT(other)) ->
        process = (other == PREPARED -> process_of_prepared : other);
#ifndef NUMBER_BEFORE_START
        found = start[process];
#endif
#ifndef NO_NUMBER
        is_sure = is_sure && number[process] == listed[other];
#endif
#ifdef NUMBER_BEFORE_START
        found = start[process];
#endif
#ifndef MISSING_START_IS_AN_END
        is_sure = is_sure && found;
#endif
        d_step {
            if
            :: found && found - 1 < least -> least = found - 1
            :: else
            fi;
            other++;
            found = 0;
            process = 0
        }
    :: other == ENTRIES -> break
    od;
    atomic {
        holders = 0; process_of_prepared = 0;
        other = 0;
        do
        :: other < ENTRIES -> listed[other] = 0; other++
        :: else -> break
        od;
        other = 0
    };
    if
    :: is_sure
    :: else -> copy_lock_table()
    fi;
    is_sure = false
}

inline take_snapshot() { /* snapshot.rs, At::Latest */
    snapshot = visible | mine
}

inline barrier() { /* settle.rs, barrier() */
#ifdef CUT_AFTER_BARRIER
    wait_for_writers();
    cut_log();
    take_snapshot()
#else
    cut_log();
#ifdef SNAPSHOT_BEFORE_WAIT
    take_snapshot();
    wait_for_writers()
#else
#ifndef NO_BARRIER
    wait_for_writers();
#endif
    take_snapshot()
#endif
#endif
}

inline find_least_start() {
    if
    :: find_starts()     /* settle.rs, horizon(): of one tenant */
    :: copy_lock_table() /* settle.rs, Horizons: of any number */
    fi
}

inline horizon() { /* settle.rs, horizon(), or Horizons::now() and of() */
#ifdef CUT_AFTER_LOCKS
    find_least_start();
    cut_log();
    take_snapshot();
#else
    cut_log();
#ifdef SNAPSHOT_BEFORE_LOCKS
    take_snapshot();
    find_least_start();
#else
    find_least_start();
    take_snapshot();
#endif
#endif
    cut = (least < cut -> least : cut);
    least = 0
}

inline claim() {
    if
    :: projection = 0
#ifndef LIVENESS
    :: projection = 1
#endif
    fi;
#ifdef CURSOR_BEFORE_LOCK
    after = cursor[projection];
#endif
    if /* Tag::projection(..).try_acquire() */
#ifndef NO_CLAIM_LOCK
    :: atomic { claimed[projection] == NOBODY -> claimed[projection] = me };
#else
    :: true ->
#endif
#ifndef CURSOR_BEFORE_LOCK
        after = cursor[projection]; /* cursor::read(): At::Latest */
#endif
        if /* settle.rs, settle(): in a transaction that has pushed always the horizon */
#ifdef BARRIER_AFTER_PUSH
        :: barrier()
#else
        :: !(writers & BIT(me)) -> barrier()
#endif
        :: horizon()
        fi;
        d_step { /* claim_range(): scan(), with a limit of one event or none */
            has_claimed = true;
            batch = snapshot & UP_TO(cut) & ~UP_TO(after) & WANTED(projection);
            position = (batch -> LAST(batch) : LAST(snapshot & UP_TO(cut)));
            position = (position > after -> position : after)
        };
        if
        :: batch != FIRST(batch) -> d_step { batch = FIRST(batch); position = LAST(batch) }
        :: true
        fi;
        d_step { snapshot = 0; cut = 0; after = 0 }
#ifndef NO_CLAIM_LOCK
    :: claimed[projection] != NOBODY -> is_busy = true; after = 0
#endif
    fi
}

/*
 * The end of a transaction: PostgreSQL's CommitTransaction() and AbortTransaction(). The commit record is in the WAL before the rows
 * are visible, and they are visible, in the same moment in which the transaction is not running any more, before its locks go.
 */
inline log_commit() { /* RecordTransactionCommit() */
    d_step {
        /* A standby shows a prefix of the commit records: none of them follows a cursor that has passed its events. */
        assert(!(mine & UP_TO(logged_cursor[0])));
        assert(!(mine & UP_TO(logged_cursor[1])));
        if
        :: has_claimed -> logged_cursor[projection] = position
        :: else
        fi
    }
}

inline show_commit() { /* ProcArrayEndTransaction() */
    d_step {
        running = running & ~BIT(me);
        number[me] = 0;
        /* No cursor has passed an event that becomes visible now. */
        assert(!(mine & UP_TO(cursor[0])));
        assert(!(mine & UP_TO(cursor[1])));
        visible = visible | mine;
        if
        :: mine ->
            /* Sequences of an aggregate have no gap and no double, and their order is that of the positions. */
            assert(sequence == length[pushes_to]);
            assert(LAST(FIRST(mine)) > head[pushes_to]);
            length[pushes_to] = sequence + pushed;
            head[pushes_to] = LAST(mine)
        :: else
        fi;
        if
        :: has_claimed ->
            /* Nothing is read twice, in order, and nothing up to the cursor is left out. */
            assert(!(batch & applied[projection]));
            assert(!batch || LAST(FIRST(batch)) > LAST(applied[projection]));
            assert(position >= cursor[projection]);
            applied[projection] = applied[projection] | batch;
            cursor[projection] = position;
            assert(applied[projection] == (visible & UP_TO(position) & WANTED(projection)))
        :: else
        fi;
        WITNESS()
    }
}

inline release_locks() { /* LockReleaseAll(): those who wait for the transaction's end go on */
    d_step {
        writers = writers & ~BIT(me);
#ifndef START_IS_KEPT
        start[me] = 0;
#endif
        running = running & ~BIT(me);
        number[me] = 0;
        other = 0;
        do
        :: other < SESSIONS -> waits_for[other] = waits_for[other] & ~BIT(me); other++
        :: else -> break
        od;
        other = 0;
        if
        :: aggregate[pushes_to] == me -> aggregate[pushes_to] = NOBODY
        :: else
        fi;
        if
        :: has_claimed && claimed[projection] == me -> claimed[projection] = NOBODY
        :: else
        fi
    }
}

#if PREPARES
inline prepare() { /* PrepareTransaction() */
    d_step { /* MarkAsPreparing() gives the entry the number of the transaction in its process; EndPrepare() */
        number[PREPARED] = number[me];
        running = running | BIT(PREPARED);
        prepared_events = mine; prepared_pushes = pushed; prepared_sequence = sequence; prepared_aggregate = pushes_to;
        if
        :: aggregate[pushes_to] == me -> aggregate[pushes_to] = PREPARED
        :: else
        fi
    };
    if /* PostPrepare_Locks(): one partition after the other */
    :: move_start(); move_writer()
    :: move_writer(); move_start()
    fi;
    d_step { /* ProcArrayClearTransaction(); who waits for this transaction waits for the prepared one then */
        running = running & ~BIT(me);
        number[me] = 0;
        is_prepared = true;
        other = 0;
        do
        :: other < SESSIONS ->
            if
            :: waits_for[other] & BIT(me) -> waits_for[other] = (waits_for[other] & ~BIT(me)) | BIT(PREPARED)
            :: else
            fi;
            other++
        :: else -> break
        od;
        other = 0
    }
}

inline move_start() {
    d_step { start[PREPARED] = start[me]; start[me] = 0 }
}

inline move_writer() {
    if
    :: writers & BIT(me) -> d_step { writers = (writers & ~BIT(me)) | BIT(PREPARED) }
    :: else
    fi
}

/* Whoever ends what is prepared, from any session. */
proctype ender(byte me) {
    SET mine, batch;
    byte pushed, sequence, pushes_to, projection, position, other;
    bool has_claimed;

end_nothing_prepared:
    do
    :: is_prepared ->
        pushes_to = prepared_aggregate;
        if
        :: true ->
            d_step { mine = prepared_events; pushed = prepared_pushes; sequence = prepared_sequence };
            log_commit();
            show_commit()
        :: true /* ROLLBACK PREPARED */
        fi;
        release_locks();
        d_step {
            mine = 0; pushed = 0; sequence = 0; pushes_to = 0;
            prepared_events = 0; prepared_pushes = 0; prepared_sequence = 0; prepared_aggregate = 0;
            is_prepared = false; prepared_by = NOBODY
        }
    od
}
#endif

inline forget() {
    d_step {
        mine = 0; pushed = 0; pushes_made = 0; pushes_to = 0; sequence = 0;
        projection = 0; position = 0; batch = 0; has_claimed = false; is_busy = false
    }
}

proctype session(byte me; bool pushes; bool claims) {
    byte transactions = (PREPARES && me -> 1 : TRANSACTIONS); /* left */
    /* Of the transaction's pushes. */
    SET mine;
    byte pushed, pushes_made, pushes_to, sequence, before, drawn; /* pushes_made: with those that were rolled back */
    bool has_aggregate, has_writer;
#ifdef CACHED_TICKETS
    byte cached;
#endif
    /* Of its claim. */
    SET snapshot, batch;
    byte projection, after, cut, least, position, other;
    bool has_claimed, is_busy;
    /* Of its look for starts. */
    byte holders, listed[ENTRIES], process, process_of_prepared, found;
    bool is_sure;

end_idle:
    do
    :: transactions || !pushes ->
        atomic {
            running = running | BIT(me);
            number[me] = transactions + 1;
            pushes_to = (PREPARES -> (me -> 0 : transactions) : me) % AGGREGATES;
            transactions = (pushes -> transactions - 1 : 0)
        };
        do
        :: pushes && pushes_made < PUSHES -> push()
        :: claims && !has_claimed && !is_busy -> claim()
        :: has_claimed || pushed ->
#ifdef VISIBLE_BEFORE_LOGGED
            show_commit();
            log_commit();
            release_locks();
#else
            log_commit();
#ifdef LOCKS_BEFORE_VISIBLE
            release_locks();
            show_commit();
#else
            show_commit();
            release_locks();
#endif
#endif
            break
#if PREPARES
        :: atomic { pushed && !has_claimed && prepared_by == NOBODY -> prepared_by = me }; prepare(); break
#endif
#ifdef LIVENESS
        :: me == 0 && pushed -> do :: true -> skip od
        :: is_busy ->
#else
        :: has_claimed || is_busy || pushes_made -> /* ROLLBACK, or the session is killed */
#endif
            release_locks();
            break
        od;
        forget()
    :: !transactions && pushes -> break
    od
#ifdef LIVENESS
    ended++
#endif
}

init {
    atomic {
        byte n = 0;
        do
        :: n < AGGREGATES -> aggregate[n] = NOBODY; n++
        :: else -> break
        od;
        n = 0;
        do
        :: n < PROJECTIONS -> claimed[n] = NOBODY; n++
        :: else -> break
        od;
        n = 0;
        do
        :: n < SESSIONS ->
            run session(n, n < WRITERS + BOTH, n >= WRITERS);
            n++
        :: else -> break
        od
#if PREPARES
        run ender(PREPARED)
#endif
    }
}
