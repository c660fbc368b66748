#!/usr/bin/env bash
# The scenario with psql. Other languages' programs beside it do the same: see ../test_scenario.py.
# PGHOST, PGDATABASE and the like say where. What loops is the shell's; each call of psql is a session of its own.
set -euo pipefail
shopt -s inherit_errexit

# Runs a script and stops at the first error.
sql() {
    psql -X -q -A -t -v ON_ERROR_STOP=1 -v number="$number" "$@"
}

# Runs a script to its end and prints the SQLSTATE of its last error, 00000 if there was none.
code() {
    { cat && printf '%s\n' '\echo :LAST_ERROR_SQLSTATE'; } | sql -v ON_ERROR_STOP=0 -v VERBOSITY=sqlstate "$@"
}

record() {
    sql -v what="$1" -v outcome="$2" <<<"INSERT INTO outcomes VALUES (:number, :'what', :'outcome')"
}

# Whether a SQLSTATE goes away when the whole transaction is tried again, as it is.
may_be_retried() {
    [[ $1 =~ ^(40001|40P01|55P03)$ ]]
}

# push ACCOUNT EXPECTED_SEQUENCE EVENT: a deposit, once, however often it is pushed, for it has an id of its own. Prints the SQLSTATE.
push() {
    code -v account="$1" -v expected="$2" -v event="$3" <<'END'
SELECT jsonb_build_array(jsonb_build_object(
    'aggregate_type', 'account', 'aggregate_id', :'account', 'event_type', 'deposited', 'expected_sequence', :expected,
    'event_id', format('00000000-0000-4000-8000-%s%s', lpad(:'number', 6, '0'), lpad(:'event', 6, '0')),
    'payload', jsonb_build_object('amount', 10 * :number + :event))) AS events
\gset
SELECT position, sequence FROM lockstep.push_events(:'events') \gset
END
}

sequence() {
    sql -v account="$1" <<<"SELECT coalesce(max(sequence), 0) FROM lockstep.aggregate_events('account', :'account')"
}

pushes() {
    local own="own $number" answer
    [[ $(push "$own" 0 1) == 00000 ]]
    # The answer to a push is lost with the connection: connect and push the same again.
    if sql -c "SELECT pg_terminate_backend(pg_backend_pid())"; then false; fi
    answer=$(push "$own" 0 1)
    [[ $answer == 23505 ]] # psql has no variable for the constraint: here, no unique keys are pushed
    record "the same push again" "$answer"
    # Somebody was faster: read, decide, push again.
    answer=$(push "$own" 0 2)
    if [[ $answer == LS001 ]]; then
        record push "$answer"
        answer=$(push "$own" "$(sequence "$own")" 2)
    fi
    [[ $answer == 00000 ]]
    answer=LS001
    while [[ $answer == LS001 ]]; do
        answer=$(push shared "$(sequence shared)" 3)
    done
    [[ $answer == 00000 ]]
}

# Claims, applies and advances in one transaction, which ends as it is told. Prints whether there are more.
claim_and_apply() {
    sql -v end="$1" <<'END'
BEGIN;
CREATE TEMP TABLE batch ON COMMIT DROP AS
SELECT position, aggregate_id, payload FROM lockstep.projection_claim('balances', max_events => 3, wait => true);
INSERT INTO applied SELECT position FROM batch ORDER BY position;
INSERT INTO balances AS b SELECT aggregate_id, sum((payload ->> 'amount')::numeric) FROM batch GROUP BY aggregate_id
ON CONFLICT (account) DO UPDATE SET total = b.total + EXCLUDED.total;
SELECT max(position) AS last, count(*) > 0 AS any FROM batch \gset
SELECT more FROM lockstep.projection_claim_state('balances') \gset
\if :any
SELECT lockstep.projection_advance('balances', up_to => :'last') \gset
\endif
:end;
\echo :more
END
}

projection() {
    record "advance without a claim" "$(code <<<"SELECT lockstep.projection_advance('balances') \gset")"
    claim_and_apply ROLLBACK >/dev/null # the worker dies: all of this comes again
    local more=t
    while [[ $more == t ]]; do
        more=$(claim_and_apply COMMIT)
    done
}

lease() {
    local token=
    while [[ ! $token ]]; do
        token=$(sql <<<"SELECT token FROM lockstep.lease_acquire('leader', 'client ' || :number, ttl => '600 seconds') WHERE acquired")
        [[ $token ]] || sleep 0.01
    done
    sql -v token="$token" <<'END'
BEGIN;
SELECT lockstep.lease_guard('leader', :token) \gset
INSERT INTO led VALUES (:number, :token);
COMMIT;
SELECT lockstep.lease_release('leader', :token) \gset
END
    # From here on it is a former holder.
    record guard "$(code -v token="$token" <<<"SELECT lockstep.lease_guard('leader', :token) \gset")"
    record "guard at commit" "$(code -v token="$token" <<'END'
BEGIN;
INSERT INTO led VALUES (:number, NULL);
SELECT lockstep.lease_guard_at_commit('leader', :token) \gset
COMMIT;
END
)"
}

sync() {
    local first second
    begin() {
        sql -v holder="$1" -v ttl="$2" \
            <<<"SELECT token FROM lockstep.replica_sync_begin('repository ' || :number, 'copy', :'holder', ttl => :'ttl')"
    }
    finish() {
        sql -v token="$1" <<<"SELECT lockstep.replica_sync_finish('repository ' || :number, 'copy', :token)"
    }
    sql <<<"SELECT lockstep.resource_create('repository ' || :number, ARRAY['primary']) \gset"
    first=$(begin first "1 microsecond")
    second=$(begin second "1 minute")
    record "sync of the first worker" "$(finish "$first")"
    record "sync of the second worker" "$(finish "$second")"
    record "copy to a current one" \
        "$(code <<<"SELECT lockstep.generation_replicated('repository ' || :number, 'primary', 'copy') \gset")"
    # The truth lives elsewhere: both are outdated.
    sql <<<"SELECT lockstep.generation_increment('repository ' || :number) \gset"
    record write "$(code <<<"SELECT lockstep.generation_increment('repository ' || :number, ARRAY['primary']) \gset")"
    record "sync from it" \
        "$(code <<<"SELECT lockstep.replica_sync_begin('repository ' || :number, 'copy', 'third', source => 'primary') \gset")"
}

queue() {
    local job stale token n
    claim() {
        sql -F ' ' -v holder="$1" -v ttl="$2" \
            <<<"SELECT job_id, token FROM lockstep.job_claim('own ' || :number, :'holder', ttl => :'ttl')"
    }
    complete() {
        sql -v job="$job" -v token="$1" <<<"SELECT lockstep.job_complete(:job, :token)"
    }
    sql <<<"SELECT lockstep.job_enqueue('own ' || :number, 'key', 'greet') \gset"
    read -r job stale <<<"$(claim first "1 microsecond")"
    read -r job token <<<"$(claim second "1 minute")"
    record "job guard" "$(code -v job="$job" -v token="$stale" <<<"SELECT lockstep.job_guard(:job, :token) \gset")"
    record "job of the first worker" "$(complete "$stale")"
    record "job of the second worker" "$(complete "$token")"
    for n in 0 1 2; do
        sql -v name="$number.$n" \
            <<<"SELECT job_id FROM lockstep.job_enqueue('shared', :'name', 'greet', jsonb_build_object('name', :'name')) \gset"
    done
    next() {
        sql -F ' ' <<<"SELECT job_id, token, payload ->> 'name' FROM lockstep.job_claim('shared', 'client ' || :number)"
    }
    while read -r job token name <<<"$(next)" && [[ $job ]]; do
        [[ $(sql -v job="$job" -v token="$token" -v name="$name" <<'END'
BEGIN;
INSERT INTO greeted VALUES (:'name');
SELECT lockstep.job_complete(:job, :token);
COMMIT;
END
) == completed ]]
    done
}

# Two sessions in each other's way: what to try again.
number=0
run_serializable() {
    code <<'END'
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT count(*) FROM lockstep.aggregate_events('race', 'serializable') \gset
\! eval "$meanwhile"
SELECT sequence FROM lockstep.push_event('race', 'serializable', 'ran') \gset
COMMIT;
END
}

races() {
    local answer
    answer=$(meanwhile="psql -X -q -o /dev/null -c \"SELECT lockstep.push_event('race', 'serializable', 'ran')\"" run_serializable)
    may_be_retried "$answer"
    record serializable "$answer"
    [[ $(meanwhile=true run_serializable) == 00000 ]]

    # The inner session meets the outer one's claim.
    export claim="SELECT count(*) FROM lockstep.projection_claim('balances', wait => true)"
    answer=$(sql <<'END'
BEGIN;
SELECT count(*) FROM lockstep.projection_claim('balances') \gset
\! psql -X -q -t -v VERBOSITY=sqlstate -c BEGIN -c "SET LOCAL lock_timeout = '10ms'" -c "$claim" -c ROLLBACK -c '\echo :LAST_ERROR_SQLSTATE'
COMMIT;
END
)
    may_be_retried "$answer"
    record "wait for a claim" "$answer"
    sql <<<"$claim \gset"

    meeting=$(mktemp -d)
    export meeting
    second a b &
    second b a
    wait $!
    rm -r "$meeting"
}

# second FIRST SECOND: pushes to both in this order, the second when the other session has pushed, too.
second() {
    local answer
    answer=$(first=$1 other=$2 code -v first="$1" -v second="$2" <<'END'
BEGIN;
SELECT sequence FROM lockstep.push_event('race', :'first', 'ran') \gset
\! touch "$meeting/$first"; until [ -e "$meeting/$other" ]; do sleep 0.01; done
SELECT sequence FROM lockstep.push_event('race', :'second', 'ran') \gset
COMMIT;
END
)
    [[ $answer != 00000 ]] || return 0
    may_be_retried "$answer"
    record "opposite orders" "$answer"
    sql -1 <<'END'
SELECT sequence FROM lockstep.push_event('race', 'a', 'ran') \gset
SELECT sequence FROM lockstep.push_event('race', 'b', 'ran') \gset
END
}

# What becomes of the position of a batch's last event that was made a float.
floats() {
    local try
    for try in \
        "advance SELECT lockstep.projection_advance('balances', up_to => :last::float8)" \
        "read SELECT count(*) FROM lockstep.read_events(after => :last::float8)"; do
        echo "${try%% *} $(code -v batch="$1" <<END
BEGIN;
SELECT max(position) AS last FROM lockstep.projection_claim('balances', max_events => :batch) \gset
${try#* };
ROLLBACK;
END
)"
    done
}

if [[ $1 == floats ]]; then
    floats "$2"
else
    running=()
    for number in $(seq "$1"); do
        (pushes; projection; lease; sync; queue) &
        running+=($!)
    done
    for client in "${running[@]}"; do
        wait "$client"
    done
    number=0
    races
fi
