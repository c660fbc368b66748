//! The errors of the extension: one variant a condition, each with its SQLSTATE, message, DETAIL and HINT.
//! This is the only file that raises; topics return `Result` and the functions at the SQL boundary call [`OrRaise::or_raise`].
//!
//! The error travels as PostgreSQL's own `ErrorData`, so a driver, a PL/pgSQL handler and a log see the five characters,
//! the constraint and the texts exactly as they see those of the server.

use pgrx::pg_sys;
use std::borrow::Cow;
use std::ffi::CString;
use std::fmt;

#[derive(Debug, PartialEq)]
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
    /// The job is not claimed with the token that was given.
    JobLost {
        job_id: i64,
        token: i64,
        actual: String,
    },
    /// A procedure that commits was called where it cannot.
    NeedsOwnTransaction(&'static str),
    /// A bad argument; `message` names it.
    InvalidParameter {
        message: String,
        detail: Option<String>,
        hint: Option<&'static str>,
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
}

impl Error {
    /// A bad argument without DETAIL or HINT.
    pub fn invalid(message: impl Into<String>) -> Self {
        Error::InvalidParameter {
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    pub fn sqlstate(&self) -> &'static str {
        match self {
            Error::SequenceConflict { .. } => "LS001",
            Error::ClaimNotHeld { .. } => "LS002",
            Error::JobLost { .. } => "LS007",
            Error::InvalidParameter { .. } => "22023",
            Error::NullArgument(_) | Error::NullElement(_) => "22004",
            Error::UniqueViolation { .. } => "23505",
            Error::NeedsReadCommitted(_) | Error::WaitsAfterPush(_) => "25000",
            Error::ReadOnly { .. } => "25006",
            Error::NeedsOwnTransaction(_) => "2D000",
            Error::SerializationFailure(_) => "40001",
            Error::Spi(_) => "XX000",
            Error::UndefinedProjection(_) => "42704",
            Error::DuplicateProjection(_) => "42710",
            Error::NotOwner { .. } | Error::NotMember { .. } | Error::HandlerDenied(_) => "42501",
            Error::TooManyEvents { .. } | Error::TooManyKeys { .. } => "54000",
            Error::TicketBehindLog { .. }
            | Error::TicketNotAbove { .. }
            | Error::NoHandler(_)
            | Error::NotSkipped { .. } => "55000",
        }
    }

    fn detail(&self) -> Option<Cow<'static, str>> {
        let detail = match self {
            Error::SequenceConflict {
                actual, expected, ..
            } => format!("Actual sequence {actual}, expected {expected}."),
            Error::ClaimNotHeld { detail, .. } => return Some(Cow::Borrowed(detail)),
            Error::JobLost { token, actual, .. } => {
                format!("Actual: {actual}, expected: in progress with token {token}.")
            }
            Error::NeedsOwnTransaction(_) => "It commits each of its tries.".into(),
            Error::InvalidParameter { detail, .. } => detail.clone()?,
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
            Error::NullArgument(_)
            | Error::NullElement(_)
            | Error::ReadOnly { .. }
            | Error::UndefinedProjection(_)
            | Error::DuplicateProjection(_)
            | Error::NotMember { .. }
            | Error::NoHandler(_)
            | Error::HandlerDenied(_)
            | Error::NotSkipped { .. }
            | Error::Spi(_) => return None,
        };
        Some(Cow::Owned(detail))
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Error::SequenceConflict { .. } => {
                Some("Read the aggregate's new events, decide again and push again.")
            }
            Error::ClaimNotHeld { .. } => Some(
                "Call projection_claim in this transaction, outside the savepoint that is rolled back.",
            ),
            Error::JobLost { .. } => {
                Some("Stop the work and roll back: the job is not this worker's.")
            }
            Error::NeedsOwnTransaction(_) => Some("Call it outside of a transaction block."),
            Error::InvalidParameter { hint, .. } => *hint,
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
            Error::NoHandler(_) => Some(
                "Register one with projection_alter(name, handler => …), or apply events in the client.",
            ),
            Error::NotSkipped { .. } => {
                Some("The projection itself applies it again, until max_failures is reached.")
            }
            Error::UniqueViolation { .. }
            | Error::NullArgument(_)
            | Error::NullElement(_)
            | Error::UndefinedProjection(_)
            | Error::NotOwner { .. }
            | Error::NotMember { .. }
            | Error::HandlerDenied(_)
            | Error::Spi(_) => None,
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
        let message = c_string(self.to_string());
        let detail = self.detail().map(|text| c_string(text.into_owned()));
        let hint = self.hint().map(|text| c_string(text.into()));
        let constraint = self.constraint().map(|text| c_string(text.into()));
        let pointer = |text: &Option<CString>| {
            text.as_ref()
                .map_or(std::ptr::null_mut(), |text| text.as_ptr().cast_mut())
        };
        let mut data = pg_sys::ErrorData {
            elevel: pgrx::PgLogLevel::ERROR as i32,
            sqlerrcode: pack(self.sqlstate()),
            message: message.as_ptr().cast_mut(),
            detail: pointer(&detail),
            hint: pointer(&hint),
            constraint_name: pointer(&constraint),
            ..Default::default()
        };
        // SAFETY: the strings live until this frame unwinds; ThrowErrorData copies them before it throws.
        unsafe { pg_sys::ThrowErrorData(&mut data) };
        unreachable!("ThrowErrorData returned from an ERROR")
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
            Error::JobLost { job_id, token, .. } => {
                write!(f, "job {job_id} is not claimed with token {token}")
            }
            Error::NeedsOwnTransaction(procedure) => {
                write!(
                    f,
                    "{procedure}() cannot run inside a transaction block or a function"
                )
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
