//! The scenario with tokio-postgres. The programs in ../../scenario do the same: see ../../test_scenario.py.
//!
//! All queries go through `query_typed`, which prepares nothing under a name: PgBouncer may give each transaction another session.

use std::{env, time::Duration};

use rust_decimal::{Decimal, prelude::ToPrimitive};
use tokio_postgres::{
    Config, Error, NoTls, Row,
    error::SqlState,
    types::{ToSql, Type},
};

type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

fn is(error: &Error, code: &str) -> bool {
    error.code().is_some_and(|found| found.code() == code)
}

/// What goes away when the whole transaction is tried again, as it is.
fn may_be_retried(error: &Error) -> bool {
    [
        SqlState::T_R_SERIALIZATION_FAILURE,
        SqlState::T_R_DEADLOCK_DETECTED,
        SqlState::LOCK_NOT_AVAILABLE,
    ]
    .iter()
    .any(|code| error.code() == Some(code))
}

fn text(value: &(dyn ToSql + Sync)) -> Parameter<'_> {
    (value, Type::TEXT)
}

fn int8(value: &i64) -> Parameter<'_> {
    (value, Type::INT8)
}

struct Client {
    number: i64,
    connection: tokio_postgres::Client,
}

async fn connect() -> Result<tokio_postgres::Client, Error> {
    let variable = |name| env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let (client, connection) = Config::new()
        .host(variable("PGHOST"))
        .port(variable("PGPORT").parse().expect("a port"))
        .dbname(variable("PGDATABASE"))
        .user(variable("PGUSER"))
        .connect(NoTls)
        .await?;
    tokio::spawn(connection);
    Ok(client)
}

impl Client {
    async fn new(number: i64) -> Result<Self, Error> {
        Ok(Self {
            number,
            connection: connect().await?,
        })
    }

    async fn rows(&self, query: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>, Error> {
        self.connection.query_typed(query, parameters).await
    }

    async fn row(&self, query: &str, parameters: &[Parameter<'_>]) -> Result<Row, Error> {
        Ok(self.rows(query, parameters).await?.swap_remove(0))
    }

    async fn text(&self, query: &str, parameters: &[Parameter<'_>]) -> Result<String, Error> {
        Ok(self.row(query, parameters).await?.get(0))
    }

    async fn record(&self, what: &str, outcome: &str) -> Result<(), Error> {
        let parameters = [int8(&self.number), text(&what), text(&outcome)];
        self.rows("INSERT INTO outcomes VALUES ($1, $2, $3)", &parameters)
            .await
            .map(drop)
    }

    /// Does what must fail, and records the SQLSTATE.
    async fn refused(
        &self,
        what: &str,
        query: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<(), Error> {
        match self.rows(query, parameters).await {
            Ok(_) => self.record(what, "accepted").await,
            Err(error) => self.record_error(what, error).await,
        }
    }

    async fn record_error(&self, what: &str, error: Error) -> Result<(), Error> {
        match error.code() {
            Some(code) => self.record(what, code.code()).await,
            None => Err(error), // not from the server
        }
    }

    /// Ends the transaction: COMMIT, or ROLLBACK if something in it failed.
    async fn end<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        match result {
            Ok(value) => self
                .connection
                .batch_execute("COMMIT")
                .await
                .map(|()| value),
            Err(error) => {
                self.connection.batch_execute("ROLLBACK").await?;
                Err(error)
            }
        }
    }

    async fn begin(&self) -> Result<(), Error> {
        self.connection.batch_execute("BEGIN").await
    }

    /// A deposit, once, however often it is pushed: it has an id of its own.
    async fn push(&self, account: &str, expected_sequence: i64, event: i64) -> Result<(), Error> {
        let deposit = format!(
            r#"[{{"aggregate_type": "account", "aggregate_id": "{account}", "event_type": "deposited",
                  "event_id": "00000000-0000-4000-8000-{:06}{event:06}",
                  "expected_sequence": {expected_sequence}, "payload": {{"amount": {}}}}}]"#,
            self.number,
            10 * self.number + event
        );
        // A String can be sent as text only; the cast makes it jsonb.
        self.rows(
            "SELECT position, sequence FROM lockstep.push_events($1::jsonb)",
            &[text(&deposit)],
        )
        .await
        .map(drop)
    }

    async fn sequence(&self, account: &str) -> Result<i64, Error> {
        let query =
            "SELECT coalesce(max(sequence), 0) FROM lockstep.aggregate_events('account', $1)";
        Ok(self.row(query, &[text(&account)]).await?.get(0))
    }

    async fn pushes(&mut self) -> Result<(), Error> {
        let own = format!("own {}", self.number);
        self.push(&own, 0, 1).await?;
        // The answer to a push is lost with the connection: connect and push the same again.
        if self
            .rows("SELECT pg_terminate_backend(pg_backend_pid())", &[])
            .await
            .is_err()
        {
            self.connection = connect().await?;
        }
        if let Err(error) = self.push(&own, 0, 1).await {
            match error.as_db_error().and_then(|error| error.constraint()) {
                Some("events_tenant_event_id_key") => {
                    self.record_error("the same push again", error).await?
                }
                _ => return Err(error),
            }
        }
        // Somebody was faster: read, decide, push again.
        match self.push(&own, 0, 2).await {
            Err(error) if is(&error, "LS001") => {
                self.record_error("push", error).await?;
                self.push(&own, self.sequence(&own).await?, 2).await?;
            }
            other => other?,
        }
        loop {
            match self.push("shared", self.sequence("shared").await?, 3).await {
                Err(error) if is(&error, "LS001") => (),
                other => return other,
            }
        }
    }

    /// Within a transaction: the events of a batch, applied, and whether there are more.
    async fn claim_and_apply(&self) -> Result<(Vec<Decimal>, bool), Error> {
        let claim = "SELECT position, aggregate_id, (payload ->> 'amount')::bigint \
                     FROM lockstep.projection_claim('balances', max_events => 3, wait => true)";
        let mut positions = Vec::new();
        for event in self.rows(claim, &[]).await? {
            let (position, account, amount) = (
                event.get::<_, Decimal>(0),
                event.get::<_, &str>(1),
                event.get::<_, i64>(2),
            );
            self.rows(
                "INSERT INTO applied VALUES ($1)",
                &[(&position, Type::NUMERIC)],
            )
            .await?;
            let add = "INSERT INTO balances AS b VALUES ($1, $2) \
                       ON CONFLICT (account) DO UPDATE SET total = b.total + EXCLUDED.total";
            self.rows(add, &[text(&account), int8(&amount)]).await?;
            positions.push(position);
        }
        let more = self
            .row(
                "SELECT more FROM lockstep.projection_claim_state('balances')",
                &[],
            )
            .await?
            .get(0);
        Ok((positions, more))
    }

    async fn claim_apply_and_advance(&self) -> Result<bool, Error> {
        let (positions, more) = self.claim_and_apply().await?;
        if let Some(last) = positions.last() {
            let advance = "SELECT lockstep.projection_advance('balances', up_to => $1)";
            let at: Decimal = self.row(advance, &[(last, Type::NUMERIC)]).await?.get(0);
            assert_eq!(at, *last);
        }
        Ok(more)
    }

    async fn projection(&self) -> Result<(), Error> {
        self.refused(
            "advance without a claim",
            "SELECT lockstep.projection_advance('balances')",
            &[],
        )
        .await?;
        self.begin().await?;
        self.claim_and_apply().await?;
        self.connection.batch_execute("ROLLBACK").await?; // the worker dies: all of this comes again
        let mut more = true;
        while more {
            self.begin().await?;
            more = self.end(self.claim_apply_and_advance().await).await?;
        }
        Ok(())
    }

    async fn lease(&self) -> Result<(), Error> {
        let holder = format!("client {}", self.number);
        let acquire = "SELECT acquired, token FROM lockstep.lease_acquire('leader', $1, ttl => $2::text::interval)";
        let token: i64 = loop {
            let row = self
                .row(acquire, &[text(&holder), text(&"600 seconds")])
                .await?;
            if row.get("acquired") {
                break row.get("token");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        self.begin().await?;
        let led = async {
            self.rows("SELECT lockstep.lease_guard('leader', $1)", &[int8(&token)])
                .await?;
            self.rows(
                "INSERT INTO led VALUES ($1, $2)",
                &[int8(&self.number), int8(&token)],
            )
            .await
        };
        self.end(led.await).await?;
        assert!(
            self.row(
                "SELECT lockstep.lease_release('leader', $1)",
                &[int8(&token)]
            )
            .await?
            .get::<_, bool>(0)
        );
        // From here on it is a former holder.
        self.refused(
            "guard",
            "SELECT lockstep.lease_guard('leader', $1)",
            &[int8(&token)],
        )
        .await?;
        self.begin().await?;
        let led = async {
            self.rows("INSERT INTO led VALUES ($1, NULL)", &[int8(&self.number)])
                .await?;
            self.rows(
                "SELECT lockstep.lease_guard_at_commit('leader', $1)",
                &[int8(&token)],
            )
            .await
        };
        match self.end(led.await).await {
            Ok(_) => self.record("guard at commit", "accepted").await,
            Err(error) => self.record_error("guard at commit", error).await,
        }
    }

    async fn sync(&self) -> Result<(), Error> {
        let resource = format!("repository {}", self.number);
        let named = [text(&resource)];
        let begin = "SELECT status, token FROM lockstep.replica_sync_begin($1, 'copy', $2, ttl => $3::text::interval)";
        let finish = "SELECT lockstep.replica_sync_finish($1, 'copy', $2)";
        self.rows(
            "SELECT lockstep.resource_create($1, ARRAY['primary'])",
            &named,
        )
        .await?;
        let first = self
            .row(
                begin,
                &[text(&resource), text(&"first"), text(&"1 microsecond")],
            )
            .await?;
        let second = self
            .row(
                begin,
                &[text(&resource), text(&"second"), text(&"1 minute")],
            )
            .await?;
        assert_eq!((first.get(0), second.get(0)), ("started", "started"));
        let lost = self
            .text(finish, &[text(&resource), int8(&first.get(1))])
            .await?;
        self.record("sync of the first worker", &lost).await?;
        let current = self
            .text(finish, &[text(&resource), int8(&second.get(1))])
            .await?;
        self.record("sync of the second worker", &current).await?;
        let copy = "SELECT lockstep.generation_replicated($1, 'primary', 'copy')";
        self.refused("copy to a current one", copy, &named).await?;
        // The truth lives elsewhere: both are outdated.
        self.rows("SELECT lockstep.generation_increment($1)", &named)
            .await?;
        let write = "SELECT lockstep.generation_increment($1, ARRAY['primary'])";
        self.refused("write", write, &named).await?;
        let sync = "SELECT lockstep.replica_sync_begin($1, 'copy', 'third', source => 'primary')";
        self.refused("sync from it", sync, &named).await
    }

    async fn jobs(&self) -> Result<(), Error> {
        let queue = format!("own {}", self.number);
        let claim =
            "SELECT job_id, token FROM lockstep.job_claim($1, $2, ttl => $3::text::interval)";
        let complete = "SELECT lockstep.job_complete($1, $2)";
        self.rows(
            "SELECT lockstep.job_enqueue($1, 'key', 'greet')",
            &[text(&queue)],
        )
        .await?;
        let first = self
            .row(
                claim,
                &[text(&queue), text(&"first"), text(&"1 microsecond")],
            )
            .await?;
        let second = self
            .row(claim, &[text(&queue), text(&"second"), text(&"1 minute")])
            .await?;
        let (job, stale, token): (i64, i64, i64) = (first.get(0), first.get(1), second.get(1));
        self.refused(
            "job guard",
            "SELECT lockstep.job_guard($1, $2)",
            &[int8(&job), int8(&stale)],
        )
        .await?;
        let lost = self.text(complete, &[int8(&job), int8(&stale)]).await?;
        self.record("job of the first worker", &lost).await?;
        let completed = self.text(complete, &[int8(&job), int8(&token)]).await?;
        self.record("job of the second worker", &completed).await?;
        for n in 0..3 {
            let name = format!("{}.{n}", self.number);
            let payload = format!(r#"{{"name": "{name}"}}"#);
            let enqueue = "SELECT lockstep.job_enqueue('shared', $1, 'greet', $2::text::jsonb)";
            self.rows(enqueue, &[text(&name), text(&payload)]).await?;
        }
        let holder = format!("client {}", self.number);
        let next = "SELECT job_id, token, payload ->> 'name' FROM lockstep.job_claim('shared', $1)";
        while let Some(job) = self.rows(next, &[text(&holder)]).await?.pop() {
            self.begin().await?;
            let done = async {
                self.rows(
                    "INSERT INTO greeted VALUES ($1)",
                    &[text(&job.get::<_, String>(2))],
                )
                .await?;
                self.text(complete, &[int8(&job.get(0)), int8(&job.get(1))])
                    .await
            };
            assert_eq!(self.end(done.await).await?, "completed");
        }
        Ok(())
    }
}

async fn work(number: i64) -> Result<(), Error> {
    let mut client = Client::new(number).await?;
    client.pushes().await?;
    client.projection().await?;
    client.lease().await?;
    client.sync().await?;
    client.jobs().await
}

async fn push(client: &Client, aggregate: &str) -> Result<(), Error> {
    client
        .rows(
            "SELECT lockstep.push_event('race', $1, 'ran')",
            &[text(&aggregate)],
        )
        .await
        .map(drop)
}

async fn serializable(one: &Client, other: &Client, disturbed: bool) -> Result<(), Error> {
    one.connection
        .batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
        .await?;
    let pushed = async {
        one.rows(
            "SELECT count(*) FROM lockstep.aggregate_events('race', 'serializable')",
            &[],
        )
        .await?;
        if disturbed {
            push(other, "serializable").await?;
        }
        push(one, "serializable").await
    };
    one.end(pushed.await).await
}

async fn second(client: &Client, aggregate: &str) -> Result<(), Error> {
    match client.end(push(client, aggregate).await).await {
        Err(error) if may_be_retried(&error) => {
            client.record_error("opposite orders", error).await?;
            client.begin().await?; // all of it again
            push(client, "a").await?;
            push(client, "b").await?;
            client.end(Ok(())).await
        }
        other => other,
    }
}

/// Two sessions in each other's way: what to try again.
async fn races() -> Result<(), Error> {
    let (one, other) = (Client::new(0).await?, Client::new(0).await?);
    match serializable(&one, &other, true).await {
        Err(error) if may_be_retried(&error) => {
            other.record_error("serializable", error).await?;
            serializable(&one, &other, false).await?;
        }
        result => result?,
    }

    let claim = "SELECT count(*) FROM lockstep.projection_claim('balances', wait => true)";
    one.begin().await?;
    one.rows(claim, &[]).await?;
    other
        .connection
        .batch_execute("BEGIN; SET LOCAL lock_timeout = '10ms'")
        .await?;
    let busy = other.end(other.rows(claim, &[]).await).await;
    one.end(Ok(())).await?;
    match busy {
        Err(error) if may_be_retried(&error) => {
            other.record_error("wait for a claim", error).await?;
            other.rows(claim, &[]).await?;
        }
        result => drop(result?),
    }

    one.begin().await?;
    push(&one, "a").await?;
    other.begin().await?;
    push(&other, "b").await?;
    tokio::try_join!(second(&one, "b"), second(&other, "a")).map(drop)
}

/// What becomes of the position of a batch's last event that was made a float.
async fn floats(batch: i64) -> Result<(), Error> {
    let client = Client::new(0).await?;
    client.begin().await?;
    let claim = "SELECT max(position) FROM lockstep.projection_claim('balances', max_events => $1::bigint::int)";
    let last: Decimal = client.row(claim, &[int8(&batch)]).await?.get(0);
    let float = last.to_f64().expect("a number");
    for (what, query) in [
        (
            "advance",
            "SELECT lockstep.projection_advance('balances', up_to => $1)::text",
        ),
        (
            "read",
            "SELECT count(*)::text FROM lockstep.read_events(after => $1)",
        ),
    ] {
        client.connection.batch_execute("SAVEPOINT s").await?;
        match client.text(query, &[(&float, Type::FLOAT8)]).await {
            Ok(outcome) => println!("{what} {outcome}"),
            Err(error) => println!(
                "{what} {}",
                error.code().map_or("refused by the driver", SqlState::code)
            ),
        }
        client.connection.batch_execute("ROLLBACK TO s").await?;
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let argument = env::args().nth(1).ok_or("an argument is needed")?;
    if argument == "floats" {
        return Ok(floats(env::args().nth(2).ok_or("a number is needed")?.parse()?).await?);
    }
    let clients: Vec<_> = (1..=argument.parse()?)
        .map(|number| tokio::spawn(work(number)))
        .collect();
    for client in clients {
        client.await??;
    }
    Ok(races().await?)
}
