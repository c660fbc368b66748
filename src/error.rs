//! The errors of the extension: one variant a condition, each with its SQLSTATE, message, DETAIL and HINT.
//! This is the only file that raises; topics return `Result` and the functions at the SQL boundary call [`OrRaise::or_raise`].
//!
//! The error travels as PostgreSQL's own `ErrorData`, so a driver, a PL/pgSQL handler and a log see the five characters,
//! the constraint and the texts exactly as they see those of the server.

use pgrx::pg_sys;
use std::borrow::Cow;
use std::ffi::CString;
use std::fmt;
use std::ops::RangeInclusive;

#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// An aggregate is not at the sequence that the push expected.
    SequenceConflict {
        aggregate_type: String,
        aggregate_id: String,
        actual: i64,
        expected: i64,
    },
    /// This transaction holds no claim on the projection.
    ClaimNotHeld {
        projection: String,
        tenant: String,
        detail: &'static str,
    },
    /// The lease is not held with the token that was given, or not guarded at all.
    LeaseLost {
        name: String,
        token: Option<i64>,
        actual: String,
    },
    /// lock_timeout ran out while transactions guarded the lease; 0 is the pid of a prepared one.
    LeaseGuarded {
        name: String,
        pids: Vec<i32>,
    },
    /// A transaction with a check at its COMMIT cannot be prepared.
    CannotPrepare(String),
    /// A procedure that commits was called where it cannot.
    NeedsOwnTransaction(&'static str),
    /// A trigger that is not fired as it must be.
    TriggerProtocol(&'static str),
    /// The token sequence has handed out a token that is not above the last one of this object.
    TokenNotAbove {
        token: i64,
        previous: i64,
    },
    /// The job is not claimed with the token that was given.
    JobLost {
        job_id: i64,
        token: i64,
        actual: String,
    },
    /// A bad argument; `message` names it.
    InvalidParameter {
        message: String,
        detail: String,
        hint: &'static str,
    },
    NullArgument(&'static str),
    /// An array with a null in it.
    NullElement(&'static str),
    /// A key that must be unique is taken; `key` reads as in PostgreSQL's own DETAIL.
    UniqueViolation {
        constraint: &'static str,
        key: String,
    },
    /// A function that cannot work under a transaction snapshot was called in REPEATABLE READ or SERIALIZABLE.
    NeedsReadCommitted(&'static str),
    /// A function that waits for writers was called in a transaction that has itself pushed.
    WaitsAfterPush(&'static str),
    /// A function that writes or locks was called on a standby or in a read-only transaction.
    ReadOnly {
        function: &'static str,
        recovery: bool,
    },
    /// A call of PostgreSQL's that does not fail in a healthy server.
    Spi(&'static str),
    /// Under a transaction snapshot: what the push builds on was changed by a transaction that it cannot see.
    SerializationFailure(String),
    UndefinedProjection(String),
    DuplicateProjection(String),
    NotOwner {
        projection: String,
        owner: String,
    },
    /// A projection without a handler is to apply an event in the server.
    NoHandler(String),
    /// The caller may not call the handler.
    HandlerDenied(String),
    /// The failed event is still being retried, so it is no dead letter yet.
    NotSkipped {
        projection: String,
        position: String,
    },
    /// The caller may not give something to the role.
    NotMember {
        role: String,
    },
    TooManyEvents {
        given: usize,
        limit: usize,
    },
    TooManyKeys {
        given: usize,
        limit: usize,
    },
    /// The ticket sequence stands below the tenant's log.
    TicketBehindLog {
        value: i64,
        head: i64,
        tenant: String,
    },
    /// The ticket sequence has handed out a ticket that is not above its own value of before.
    TicketNotAbove {
        ticket: i64,
        value: i64,
    },
    /// The library does not know the SQL objects: those of before an upgrade, or of after one that this session has not followed.
    SchemaVersion {
        actual: i32,
        expected: RangeInclusive<i32>,
    },
    /// The target of a replication is not behind its source; what holds nothing has no generation.
    GenerationDowngrade {
        resource: String,
        source: String,
        target: String,
        source_generation: Option<i64>,
        target_generation: i64,
    },
    /// A write to replicas of which none is current; `actual` lists them with their generations.
    OutdatedReplica {
        resource: String,
        generation: i64,
        actual: String,
    },
    /// The source that a sync names is not at the resource's generation.
    SourceNotCurrent {
        resource: String,
        source: String,
        actual: Option<i64>,
        expected: i64,
    },
    UndefinedResource {
        resource: String,
        deleted: bool,
    },
    UndefinedReplica {
        resource: String,
        replica: String,
    },
    DuplicateResource {
        resource: String,
        incarnation: i64,
    },
}

/// A replica's generation in a DETAIL.
fn held(generation: Option<i64>) -> String {
    generation.map_or_else(|| "none".into(), |generation| generation.to_string())
}

fn versions(range: &RangeInclusive<i32>) -> String {
    let (first, last) = (range.start(), range.end());
    if first == last {
        return last.to_string();
    }
    format!("{first} to {last}")
}

impl Error {
    /// A bad argument: what it must be, what it is, what is expected, and the way out.
    pub fn invalid(
        message: impl Into<String>,
        actual: impl fmt::Display,
        expected: impl fmt::Display,
        hint: &'static str,
    ) -> Self {
        Error::InvalidParameter {
            message: message.into(),
            detail: format!("Actual {actual}, expected {expected}."),
            hint,
        }
    }

    pub fn sqlstate(&self) -> &'static str {
        match self {
            Error::SequenceConflict { .. } => "LS001",
            Error::ClaimNotHeld { .. } => "LS002",
            Error::LeaseLost { .. } => "LS003",
            Error::CannotPrepare(_) => "0A000",
            Error::GenerationDowngrade { .. } => "LS004",
            Error::OutdatedReplica { .. } => "LS005",
            Error::SourceNotCurrent { .. } => "LS006",
            Error::JobLost { .. } => "LS007",
            Error::InvalidParameter { .. } => "22023",
            Error::NullArgument(_) | Error::NullElement(_) => "22004",
            Error::UniqueViolation { .. } => "23505",
            Error::NeedsReadCommitted(_) | Error::WaitsAfterPush(_) => "25000",
            Error::ReadOnly { .. } => "25006",
            Error::NeedsOwnTransaction(_) => "2D000",
            Error::TriggerProtocol(_) => "39P01",
            Error::SerializationFailure(_) => "40001",
            Error::Spi(_) => "XX000",
            Error::UndefinedProjection(_)
            | Error::UndefinedResource { .. }
            | Error::UndefinedReplica { .. } => "42704",
            Error::DuplicateProjection(_) | Error::DuplicateResource { .. } => "42710",
            Error::NotOwner { .. } | Error::NotMember { .. } | Error::HandlerDenied(_) => "42501",
            Error::TooManyEvents { .. } | Error::TooManyKeys { .. } => "54000",
            Error::TicketBehindLog { .. }
            | Error::TicketNotAbove { .. }
            | Error::TokenNotAbove { .. }
            | Error::SchemaVersion { .. }
            | Error::NoHandler(_)
            | Error::NotSkipped { .. } => "55000",
            Error::LeaseGuarded { .. } => "55P03",
        }
    }

    fn detail(&self) -> Option<Cow<'static, str>> {
        let detail = match self {
            Error::SequenceConflict {
                actual, expected, ..
            } => format!("Actual sequence {actual}, expected {expected}."),
            Error::ClaimNotHeld { detail, .. } => return Some(Cow::Borrowed(detail)),
            Error::LeaseLost {
                token: Some(token),
                actual,
                ..
            } => format!("Actual: {actual}, expected: held with token {token}."),
            Error::LeaseLost { actual, .. } => {
                format!("Actual: {actual}, expected: a guard in this transaction.")
            }
            Error::TokenNotAbove { token, previous } => {
                format!("Token drawn {token}, last token handed out {previous}.")
            }
            Error::CannotPrepare(_) => {
                "The lease could be taken over between PREPARE TRANSACTION and COMMIT PREPARED.".into()
            }
            Error::JobLost { token, actual, .. } => {
                format!("Actual: {actual}, expected: in progress with token {token}.")
            }
            Error::NeedsOwnTransaction(_) => "It commits each of its tries.".into(),
            Error::InvalidParameter { detail, .. } => detail.clone(),
            Error::UniqueViolation { key, .. } => format!("Key {key} already exists."),
            Error::NeedsReadCommitted(_) => {
                "It builds on rows that are newer than the transaction's snapshot, and its other statements could not see them."
                    .into()
            }
            Error::WaitsAfterPush(_) => {
                "Two transactions that have pushed and wait for each other's end would deadlock.".into()
            }
            Error::SerializationFailure(detail) => detail.clone(),
            Error::NotOwner { owner, .. } => format!("It belongs to role \"{owner}\"."),
            Error::TooManyEvents { given, limit } => {
                format!("Events given {given}, at most {limit}.")
            }
            Error::TooManyKeys { given, limit } => {
                format!("Aggregates, unique keys and event ids given {given}, at most {limit}.")
            }
            Error::TicketBehindLog {
                value,
                head,
                tenant,
            } => {
                format!("Last ticket drawn {value}, last ticket in the log of tenant \"{tenant}\" {head}.")
            }
            Error::TicketNotAbove { ticket, value } => {
                format!("Ticket drawn {ticket}, last ticket drawn before {value}.")
            }
            Error::SchemaVersion { actual, expected } => {
                format!("Actual version {actual}, expected {}.", versions(expected))
            }
            Error::GenerationDowngrade {
                source_generation,
                target_generation,
                ..
            } => format!(
                "Target generation {target_generation}, source generation {}.",
                held(*source_generation)
            ),
            Error::OutdatedReplica {
                generation, actual, ..
            } => format!("Actual generations {actual}, expected {generation}."),
            Error::SourceNotCurrent {
                actual, expected, ..
            } => format!("Actual generation {}, expected {expected}.", held(*actual)),
            Error::UndefinedResource { deleted: true, .. } => {
                return Some(Cow::Borrowed("It was deleted."));
            }
            Error::DuplicateResource { incarnation, .. } => {
                format!("Actual incarnation {incarnation}, expected none.")
            }
            Error::NullArgument(_) => "Actual null, expected a value.".into(),
            Error::NullElement(_) => "Actual null among its elements, expected values.".into(),
            Error::ReadOnly { recovery: true, .. } => "The server is a standby.".into(),
            Error::ReadOnly { .. } => "The function writes or locks.".into(),
            Error::UndefinedProjection(_)
            | Error::UndefinedResource { .. }
            | Error::UndefinedReplica { .. } => "Actual none, expected one of this name.".into(),
            Error::DuplicateProjection(_) => "Actual one of this name, expected none.".into(),
            Error::NotMember { .. } => "A projection is given to roles of which the caller is a member.".into(),
            Error::NoHandler(_) => "Actual handler null, expected a function.".into(),
            Error::HandlerDenied(_) => "A projection's handler is called with its caller's rights.".into(),
            Error::NotSkipped { .. } => "Actual: it is still being retried, expected: skipped.".into(),
            Error::LeaseGuarded { .. } => "Another transaction guards, renews or acquires it.".into(),
            Error::TriggerProtocol(_) => "A guard after a row, or for each of them, would come too late or too often.".into(),
            Error::Spi(_) => return None,
        };
        Some(Cow::Owned(detail))
    }

    fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Error::LeaseGuarded { pids, .. } => {
                let mut holders: Vec<String> = pids
                    .iter()
                    .map(|pid| match pid {
                        0 => "a prepared transaction".into(),
                        pid => format!("pid {pid}"),
                    })
                    .collect();
                if holders.is_empty() {
                    return Some(Cow::Borrowed("Try again: who was in the way has gone."));
                }
                holders.sort();
                Some(Cow::Owned(format!(
                    "Wait for {}, or end it.",
                    holders.join(" and ")
                )))
            }
            _ => self.fixed_hint().map(Cow::Borrowed),
        }
    }

    fn fixed_hint(&self) -> Option<&'static str> {
        match self {
            Error::SequenceConflict { .. } => {
                Some("Read the aggregate's new events, decide again and push again.")
            }
            Error::ClaimNotHeld { .. } => Some(
                "Call projection_claim in this transaction, outside the savepoint that is rolled back.",
            ),
            Error::LeaseLost { token: Some(_), .. } => {
                Some("Stop the work. To go on, acquire the lease again and read the state anew.")
            }
            Error::LeaseLost { .. } => Some(
                "SELECT lockstep.lease_guard(name, token) in this transaction, before the write.",
            ),
            Error::CannotPrepare(_) => Some("Use lease_guard, which a prepared transaction keeps."),
            Error::NeedsOwnTransaction(_) => Some("Call it outside of a transaction block."),
            Error::TokenNotAbove { .. } => Some(
                "ALTER SEQUENCE lockstep.token CACHE 1, then SELECT lockstep.after_data_loss().",
            ),
            Error::JobLost { .. } => {
                Some("Stop the work and roll back: the job is not this worker's.")
            }
            Error::InvalidParameter { hint, .. } => Some(hint),
            Error::NeedsReadCommitted(_) => Some("Use a READ COMMITTED transaction."),
            Error::WaitsAfterPush(_) => Some(
                "Commit first, or use what does not wait: barrier => false, wait => false, horizon().",
            ),
            Error::ReadOnly { recovery: true, .. } => Some("Connect to the primary server."),
            Error::ReadOnly {
                recovery: false, ..
            } => Some("Use a read-write transaction."),
            Error::SerializationFailure(_) => Some("Retry the transaction."),
            Error::DuplicateProjection(_) => {
                Some("Use if_not_exists => true to keep the one that is there.")
            }
            Error::TooManyEvents { .. } => Some("Push in several parts."),
            Error::TooManyKeys { .. } => Some(
                "Push in several parts, or raise lockstep.max_aggregates_per_push along with max_locks_per_transaction.",
            ),
            Error::TicketBehindLog { .. } => {
                Some("SELECT lockstep.ticket_resync() sets the sequence above the log.")
            }
            Error::TicketNotAbove { .. } => Some(
                "ALTER SEQUENCE lockstep.ticket CACHE 1, then SELECT lockstep.ticket_resync().",
            ),
            Error::SchemaVersion { actual, expected } if actual < expected.start() => {
                Some("ALTER EXTENSION lockstep UPDATE")
            }
            Error::SchemaVersion { .. } => Some(
                "Connect again; where lockstep is in shared_preload_libraries, restart the server.",
            ),
            Error::NoHandler(_) => Some(
                "Register one with projection_alter(name, handler => …), or apply events in the client.",
            ),
            Error::NotSkipped { .. } => {
                Some("The projection itself applies it again, until max_failures is reached.")
            }
            Error::GenerationDowngrade { .. } => {
                Some("Do not replicate: it would overwrite what is as new or newer.")
            }
            Error::OutdatedReplica { .. } => Some(
                "Write to a current replica (see generation_current), or sync one of these first.",
            ),
            Error::SourceNotCurrent { .. } => {
                Some("Name a current replica as the source: see generation_current.")
            }
            Error::UndefinedResource { .. } => Some("Create it with resource_create."),
            Error::DuplicateResource { .. } => Some("Delete it first with resource_delete."),
            Error::UniqueViolation { constraint, .. } => Some(match *constraint {
                "events_tenant_event_id_key" => "The event is in the log already.",
                _ => "Choose another value, or release it first.",
            }),
            Error::NullArgument(_) => {
                Some("Give a value, or leave the argument out where it has a default.")
            }
            Error::NullElement(_) => Some("Leave the null out."),
            Error::UndefinedProjection(_) => Some(
                "Create it with projection_create; lockstep.projections has those that there are.",
            ),
            Error::UndefinedReplica { .. } => {
                Some("lockstep.replica_status has those that there are.")
            }
            Error::NotOwner { .. } => {
                Some("GRANT the owner's role to the caller, or SET ROLE to it.")
            }
            Error::NotMember { .. } => Some("GRANT the role to the caller."),
            Error::HandlerDenied(_) => Some("GRANT EXECUTE ON FUNCTION … TO the caller."),
            Error::TriggerProtocol(_) => Some(
                "CREATE TRIGGER … BEFORE INSERT OR UPDATE OR DELETE ON … FOR EACH STATEMENT EXECUTE FUNCTION lockstep.lease_guard_trigger('…').",
            ),
            Error::LeaseGuarded { .. } | Error::Spi(_) => None,
        }
    }

    fn constraint(&self) -> Option<&'static str> {
        match self {
            Error::UniqueViolation { constraint, .. } => Some(constraint),
            _ => None,
        }
    }

    /// Raises the error in PostgreSQL; destructors of the calling frames run.
    pub fn raise(self) -> ! {
        self.report(pgrx::PgLogLevel::ERROR);
        unreachable!("ThrowErrorData returned from an ERROR")
    }

    /// Writes it to the server's log, for a process that has nobody to tell.
    pub fn log(&self) {
        self.report(pgrx::PgLogLevel::LOG);
    }

    fn report(&self, level: pgrx::PgLogLevel) {
        let message = c_string(self.to_string());
        let detail = self.detail().map(|text| c_string(text.into_owned()));
        let hint = self.hint().map(|text| c_string(text.into_owned()));
        let constraint = self.constraint().map(|text| c_string(text.into()));
        let pointer = |text: &Option<CString>| {
            text.as_ref()
                .map_or(std::ptr::null_mut(), |text| text.as_ptr().cast_mut())
        };
        let mut data = pg_sys::ErrorData {
            elevel: level as i32,
            sqlerrcode: pack(self.sqlstate()),
            message: message.as_ptr().cast_mut(),
            detail: pointer(&detail),
            hint: pointer(&hint),
            constraint_name: pointer(&constraint),
            ..Default::default()
        };
        // SAFETY: the strings live until this frame unwinds; ThrowErrorData copies them.
        unsafe { pg_sys::ThrowErrorData(&mut data) };
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::SequenceConflict {
                aggregate_type,
                aggregate_id,
                actual,
                expected,
            } => write!(
                f,
                "aggregate \"{aggregate_type}/{aggregate_id}\" is at sequence {actual}, expected {expected}"
            ),
            Error::ClaimNotHeld {
                projection, tenant, ..
            } => write!(
                f,
                "this transaction holds no claim on projection \"{projection}\" of tenant \"{tenant}\""
            ),
            Error::LeaseLost {
                name,
                token: Some(token),
                ..
            } => write!(f, "lease \"{name}\" is not held with token {token}"),
            Error::LeaseLost { name, .. } => {
                write!(f, "lease \"{name}\" is not guarded by this transaction")
            }
            Error::LeaseGuarded { name, .. } => {
                write!(f, "could not take lease \"{name}\" within lock_timeout")
            }
            Error::CannotPrepare(name) => write!(
                f,
                "cannot PREPARE a transaction that guards lease \"{name}\" at its COMMIT"
            ),
            Error::JobLost { job_id, token, .. } => {
                write!(f, "job {job_id} is not claimed with token {token}")
            }
            Error::NeedsOwnTransaction(procedure) => {
                write!(
                    f,
                    "{procedure}() cannot run inside a transaction block or a function"
                )
            }
            Error::TriggerProtocol(message) => f.write_str(message),
            Error::TokenNotAbove { .. } => {
                f.write_str("the token sequence gave a token out of order")
            }
            Error::InvalidParameter { message, .. } => f.write_str(message),
            Error::NullArgument(name) => write!(f, "argument \"{name}\" must not be null"),
            Error::NullElement(name) => write!(f, "argument \"{name}\" must not contain null"),
            Error::Spi(function) => write!(f, "{function} failed"),
            Error::UniqueViolation { constraint, .. } => {
                write!(
                    f,
                    "duplicate key value violates unique constraint \"{constraint}\""
                )
            }
            Error::NeedsReadCommitted(function) => write!(
                f,
                "{function}() cannot run in a REPEATABLE READ or SERIALIZABLE transaction"
            ),
            Error::WaitsAfterPush(what) => {
                write!(
                    f,
                    "{what} cannot wait in a transaction that has pushed events"
                )
            }
            Error::ReadOnly {
                function,
                recovery: true,
            } => write!(f, "cannot execute {function}() during recovery"),
            Error::ReadOnly {
                function,
                recovery: false,
            } => write!(f, "cannot execute {function}() in a read-only transaction"),
            Error::SerializationFailure(_) => {
                f.write_str("could not serialize access due to concurrent update")
            }
            Error::UndefinedProjection(name) => write!(f, "projection \"{name}\" does not exist"),
            Error::DuplicateProjection(name) => write!(f, "projection \"{name}\" already exists"),
            Error::NotOwner { projection, .. } => {
                write!(f, "must be owner of projection \"{projection}\"")
            }
            Error::HandlerDenied(name) => write!(f, "permission denied for handler {name}"),
            Error::NoHandler(name) => write!(f, "projection \"{name}\" has no handler"),
            Error::NotSkipped {
                projection,
                position,
            } => write!(
                f,
                "event {position} has not been skipped by projection \"{projection}\""
            ),
            Error::NotMember { role } => write!(f, "must be able to SET ROLE \"{role}\""),
            Error::TooManyEvents { .. } => f.write_str("too many events in one push"),
            Error::TooManyKeys { .. } => {
                f.write_str("too many aggregates and unique keys in one push")
            }
            Error::TicketBehindLog { .. } => {
                f.write_str("the ticket sequence is not above the event log")
            }
            Error::TicketNotAbove { .. } => {
                f.write_str("the ticket sequence gave a ticket out of order")
            }
            Error::GenerationDowngrade {
                resource,
                source,
                target,
                target_generation,
                ..
            } => write!(
                f,
                "replica \"{target}\" of resource \"{resource}\" is at generation {target_generation}, not behind \"{source}\""
            ),
            Error::OutdatedReplica {
                resource,
                generation,
                ..
            } => write!(
                f,
                "none of the replicas named is at generation {generation} of resource \"{resource}\""
            ),
            Error::SourceNotCurrent {
                resource,
                source,
                expected,
                ..
            } => write!(
                f,
                "source \"{source}\" is not at generation {expected} of resource \"{resource}\""
            ),
            Error::SchemaVersion { actual, .. } => write!(
                f,
                "this library does not work with version {actual} of the SQL objects of extension \"lockstep\""
            ),
            Error::UndefinedResource { resource, .. } => {
                write!(f, "resource \"{resource}\" does not exist")
            }
            Error::UndefinedReplica { resource, replica } => {
                write!(
                    f,
                    "replica \"{replica}\" of resource \"{resource}\" does not exist"
                )
            }
            Error::DuplicateResource { resource, .. } => {
                write!(f, "resource \"{resource}\" already exists")
            }
        }
    }
}

/// The end of the road for a topic's `Result`, used by the functions at the SQL boundary.
pub trait OrRaise<T> {
    fn or_raise(self) -> T;
}

impl<T> OrRaise<T> for Result<T, Error> {
    fn or_raise(self) -> T {
        self.unwrap_or_else(|error| error.raise())
    }
}

/// Five characters of 6 bits each, as PostgreSQL's MAKE_SQLSTATE.
fn pack(sqlstate: &str) -> i32 {
    sqlstate
        .bytes()
        .rev()
        .fold(0, |code, c| (code << 6) | i32::from((c - b'0') & 0x3F))
}

/// NUL cannot come from SQL; were one to, the text ends there.
fn c_string(text: String) -> CString {
    let mut bytes = text.into_bytes();
    if let Some(nul) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(nul);
    }
    CString::new(bytes).unwrap_or_default()
}
