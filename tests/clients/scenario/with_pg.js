// The scenario with pg (node-postgres). Other languages' programs beside it do the same: see ../test_scenario.py.
const { setTimeout } = require("node:timers/promises");
const pg = require("pg");

const RETRY = ["40001", "40P01", "55P03"]; // the whole transaction, as it is

function check(truth, what) {
    if (!truth) throw new Error(what);
}

class Client {
    constructor(number) {
        this.number = number;
    }

    async connect() {
        this.connection = new pg.Client(); // PGHOST, PGDATABASE and the like say where
        this.connection.on("error", () => {}); // without it, a lost connection ends the process
        await this.connection.connect();
        return this;
    }

    async rows(query, ...parameters) {
        return (await this.connection.query(query, parameters)).rows;
    }

    async row(query, ...parameters) {
        return (await this.rows(query, ...parameters))[0];
    }

    async transaction(body) {
        await this.rows("BEGIN");
        try {
            await body();
            await this.rows("COMMIT");
        } catch (error) {
            await this.rows("ROLLBACK");
            throw error;
        }
    }

    async record(what, outcome) {
        await this.rows("INSERT INTO outcomes VALUES ($1, $2, $3)", this.number, what, outcome);
    }

    // Does what must fail, and records the SQLSTATE.
    async refused(what, query, ...parameters) {
        try {
            await this.rows(query, ...parameters);
        } catch (error) {
            return this.record(what, error.code);
        }
        return this.record(what, "accepted");
    }

    // A deposit, once, however often it is pushed: it has an id of its own.
    async push(account, expectedSequence, event) {
        const deposit = {
            aggregate_type: "account",
            aggregate_id: account,
            event_type: "deposited",
            event_id: `00000000-0000-4000-8000-${String(this.number).padStart(6, "0")}${String(event).padStart(6, "0")}`,
            expected_sequence: expectedSequence,
            payload: { amount: 10 * this.number + event },
        };
        // JSON as text: pg would make an array of PostgreSQL's from an array.
        await this.rows("SELECT position, sequence FROM lockstep.push_events($1)", JSON.stringify([deposit]));
    }

    // A bigint comes as a string, and as a number only where it is known to be small.
    async sequence(account) {
        const query = "SELECT coalesce(max(sequence), 0) AS sequence FROM lockstep.aggregate_events('account', $1)";
        return Number((await this.row(query, account)).sequence);
    }

    async pushes() {
        const own = `own ${this.number}`;
        await this.push(own, 0, 1);
        // The answer to a push is lost with the connection: connect and push the same again.
        try {
            await this.rows("SELECT pg_terminate_backend(pg_backend_pid())");
        } catch {
            await this.connect();
        }
        try {
            await this.push(own, 0, 1);
        } catch (error) {
            if (error.constraint !== "events_tenant_event_id_key") throw error;
            await this.record("the same push again", error.code);
        }
        // Somebody was faster: read, decide, push again.
        try {
            await this.push(own, 0, 2);
        } catch (error) {
            if (error.code !== "LS001") throw error;
            await this.record("push", error.code);
            await this.push(own, await this.sequence(own), 2);
        }
        for (let pushed = false; !pushed; ) {
            try {
                await this.push("shared", await this.sequence("shared"), 3);
                pushed = true;
            } catch (error) {
                if (error.code !== "LS001") throw error;
            }
        }
    }

    // Within a transaction: the events of a batch, applied, and whether there are more.
    async claimAndApply() {
        const events = await this.rows(
            "SELECT position, aggregate_id, payload FROM lockstep.projection_claim('balances', max_events => 3, wait => true)",
        );
        for (const { position, aggregate_id, payload } of events) {
            await this.rows("INSERT INTO applied VALUES ($1)", position);
            await this.rows(
                "INSERT INTO balances AS b VALUES ($1, $2) ON CONFLICT (account) DO UPDATE SET total = b.total + EXCLUDED.total",
                aggregate_id,
                payload.amount,
            );
        }
        const { more } = await this.row("SELECT more FROM lockstep.projection_claim_state('balances')");
        return { events, more };
    }

    async projection() {
        await this.refused("advance without a claim", "SELECT lockstep.projection_advance('balances')");
        await this.rows("BEGIN");
        await this.claimAndApply();
        await this.rows("ROLLBACK"); // the worker dies: all of this comes again
        for (let left = true; left; ) {
            await this.transaction(async () => {
                const { events, more } = await this.claimAndApply();
                left = more;
                if (events.length > 0) {
                    const last = events.at(-1).position; // a string
                    const { at } = await this.row("SELECT lockstep.projection_advance('balances', up_to => $1) AS at", last);
                    check(at === last, "advanced to another position");
                }
            });
        }
    }

    async lease() {
        let held = {};
        while (!held.acquired) {
            const query = "SELECT acquired, token FROM lockstep.lease_acquire('leader', $1, ttl => $2)";
            held = await this.row(query, `client ${this.number}`, "600 seconds");
            if (!held.acquired) await setTimeout(10);
        }
        await this.transaction(async () => {
            await this.rows("SELECT lockstep.lease_guard('leader', $1)", held.token);
            await this.rows("INSERT INTO led VALUES ($1, $2)", this.number, held.token);
        });
        const { released } = await this.row("SELECT lockstep.lease_release('leader', $1) AS released", held.token);
        check(released, "the lease was lost");
        // From here on it is a former holder.
        await this.refused("guard", "SELECT lockstep.lease_guard('leader', $1)", held.token);
        try {
            await this.transaction(async () => {
                await this.rows("INSERT INTO led VALUES ($1, NULL)", this.number);
                await this.rows("SELECT lockstep.lease_guard_at_commit('leader', $1)", held.token);
            });
        } catch (error) {
            await this.record("guard at commit", error.code);
        }
    }

    async sync() {
        const resource = `repository ${this.number}`;
        const begin = "SELECT status, token FROM lockstep.replica_sync_begin($1, 'copy', $2, ttl => $3)";
        const finish = "SELECT lockstep.replica_sync_finish($1, 'copy', $2) AS status";
        await this.rows("SELECT lockstep.resource_create($1, ARRAY['primary'])", resource);
        const first = await this.row(begin, resource, "first", "1 microsecond");
        const second = await this.row(begin, resource, "second", "1 minute");
        check(first.status === "started" && second.status === "started", "no sync");
        await this.record("sync of the first worker", (await this.row(finish, resource, first.token)).status);
        await this.record("sync of the second worker", (await this.row(finish, resource, second.token)).status);
        await this.refused("copy to a current one", "SELECT lockstep.generation_replicated($1, 'primary', 'copy')", resource);
        await this.rows("SELECT lockstep.generation_increment($1)", resource); // the truth lives elsewhere: both are outdated
        await this.refused("write", "SELECT lockstep.generation_increment($1, ARRAY['primary'])", resource);
        await this.refused("sync from it", "SELECT lockstep.replica_sync_begin($1, 'copy', 'third', source => 'primary')", resource);
    }

    async jobs() {
        const queue = `own ${this.number}`;
        const claim = "SELECT job_id, token FROM lockstep.job_claim($1, $2, ttl => $3)";
        const complete = "SELECT lockstep.job_complete($1, $2) AS status";
        await this.rows("SELECT lockstep.job_enqueue($1, 'key', 'greet')", queue);
        const first = await this.row(claim, queue, "first", "1 microsecond");
        const second = await this.row(claim, queue, "second", "1 minute");
        await this.refused("job guard", "SELECT lockstep.job_guard($1, $2)", first.job_id, first.token);
        await this.record("job of the first worker", (await this.row(complete, first.job_id, first.token)).status);
        await this.record("job of the second worker", (await this.row(complete, second.job_id, second.token)).status);
        for (let n = 0; n < 3; n++) {
            const name = `${this.number}.${n}`;
            await this.rows("SELECT lockstep.job_enqueue('shared', $1, 'greet', $2)", name, { name });
        }
        const next = "SELECT job_id, token, payload FROM lockstep.job_claim('shared', $1)";
        for (let job; (job = await this.row(next, `client ${this.number}`)); ) {
            await this.transaction(async () => {
                await this.rows("INSERT INTO greeted VALUES ($1)", job.payload.name);
                check((await this.row(complete, job.job_id, job.token)).status === "completed", "the job was lost");
            });
        }
    }
}

async function work(number) {
    const client = await new Client(number).connect();
    await client.pushes();
    await client.projection();
    await client.lease();
    await client.sync();
    await client.jobs();
    await client.connection.end();
}

async function push(client, aggregate) {
    await client.rows("SELECT lockstep.push_event('race', $1, 'ran')", aggregate);
}

// Two sessions in each other's way: what to try again.
async function races() {
    const [one, other] = [await new Client(0).connect(), await new Client(0).connect()];

    const serializable = (disturbed) =>
        one.transaction(async () => {
            await one.rows("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE");
            await one.rows("SELECT count(*) FROM lockstep.aggregate_events('race', 'serializable')");
            if (disturbed) await push(other, "serializable");
            await push(one, "serializable");
        });
    try {
        await serializable(true);
    } catch (error) {
        if (!RETRY.includes(error.code)) throw error;
        await other.record("serializable", error.code);
        await serializable(false);
    }

    const claim = "SELECT count(*) FROM lockstep.projection_claim('balances', wait => true)";
    let busy;
    await one.transaction(async () => {
        await one.rows(claim);
        try {
            await other.transaction(async () => {
                await other.rows("SET LOCAL lock_timeout = '10ms'");
                await other.rows(claim);
            });
        } catch (error) {
            if (!RETRY.includes(error.code)) throw error;
            busy = error.code;
        }
    });
    await other.record("wait for a claim", busy);
    await other.rows(claim);

    for (const [client, aggregate] of [[one, "a"], [other, "b"]]) {
        await client.rows("BEGIN");
        await push(client, aggregate);
    }
    const second = async (client, aggregate) => {
        try {
            await push(client, aggregate);
            await client.rows("COMMIT");
        } catch (error) {
            await client.rows("ROLLBACK");
            if (!RETRY.includes(error.code)) throw error;
            await client.record("opposite orders", error.code);
            await client.transaction(async () => { // all of it again
                await push(client, "a");
                await push(client, "b");
            });
        }
    };
    await Promise.all([second(one, "b"), second(other, "a")]);
    await Promise.all([one.connection.end(), other.connection.end()]);
}

// What becomes of the position of a batch's last event that was made a float.
async function floats(batch) {
    const client = await new Client(0).connect();
    await client.rows("BEGIN");
    const events = await client.rows("SELECT position FROM lockstep.projection_claim('balances', max_events => $1)", batch);
    for (const [what, query] of [
        ["advance", "SELECT lockstep.projection_advance('balances', up_to => $1)::text AS outcome"],
        ["read", "SELECT count(*)::text AS outcome FROM lockstep.read_events(after => $1)"],
    ]) {
        await client.rows("SAVEPOINT s");
        try {
            console.log(what, (await client.row(query, Number(events.at(-1).position))).outcome);
        } catch (error) {
            console.log(what, error.code);
        }
        await client.rows("ROLLBACK TO s");
    }
    await client.connection.end();
}

async function main(argument, batch) {
    if (argument === "floats") return floats(batch);
    await Promise.all(Array.from({ length: Number(argument) }, (_, n) => work(n + 1)));
    return races();
}

main(...process.argv.slice(2)).catch((error) => {
    console.error(error);
    process.exit(1);
});
